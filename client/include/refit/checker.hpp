// Digests of what is really in an engine's memory, and their comparison with what should be there.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "refit/types.hpp"

namespace refit {

using NamedDigest = std::pair<std::string, Digest>;

struct CheckRequest {
  std::string engine;
  std::string module;
  DigestKind kind = DigestKind::sglang;
  std::vector<NamedDigest> expected = {};
  Place place = Place::host;  ///< `all`: each place that a tensor has must hold what is expected
};

/// Lists are sorted and complete. Live tensors that are not expected are not looked at, nor are
/// device places of layers that come or go while they are hashed: they are absent.
struct CheckReport {
  std::uint32_t verified = 0;  ///< tensors with what is expected in every place that was looked at
  std::vector<std::string> missing;
  std::vector<std::string> mismatched;         ///< on the host
  std::vector<std::string> device_mismatched;  ///< on the device
  std::vector<std::string> absent;             ///< asked for on the device, and not there now
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0;
  /// The last version of which a check or the proof in the background found every tensor equal, in
  /// every place that it has: a check of an offloaded module asks for Place::all to prove anything.
  std::optional<std::uint64_t> proven_version;

  /// Everything expected is there, equal, and the module is whole.
  [[nodiscard]] bool ok() const noexcept {
    return missing.empty() && mismatched.empty() && device_mismatched.empty() &&
           state != ModuleState::poisoned && state != ModuleState::writing;
  }
};

struct DigestRequest {
  std::string engine;
  std::string module;
  DigestKind kind = DigestKind::sglang;
  std::vector<std::string> selection = {};  ///< empty means all
  bool per_module = false;  ///< also the module's own digest, one serial stream over the host's
  Place place = Place::host;
};

struct DigestReport {
  std::vector<NamedDigest> tensors;  ///< on the host, sorted by name
  std::vector<NamedDigest> device;   ///< on the device, sorted by name
  std::vector<std::string> absent;   ///< asked for on the device, and not there now
  Digest module;                     ///< length 0 unless asked for
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0;
};

}  // namespace refit
