// Digests of what is really in an engine's memory, and their comparison with what should be there.
#pragma once

#include <cstdint>
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
};

/// Lists are sorted and complete. Live tensors that are not expected are not looked at.
struct CheckReport {
  std::uint32_t verified = 0;
  std::vector<std::string> missing;
  std::vector<std::string> mismatched;
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0;

  /// Everything expected is there, equal, and the module is whole.
  [[nodiscard]] bool ok() const noexcept {
    return missing.empty() && mismatched.empty() && state != ModuleState::poisoned &&
           state != ModuleState::writing;
  }
};

struct DigestRequest {
  std::string engine;
  std::string module;
  DigestKind kind = DigestKind::sglang;
  std::vector<std::string> selection = {};  ///< empty means all
  bool per_module = false;                  ///< also the module's own digest, one serial stream
};

struct DigestReport {
  std::vector<NamedDigest> tensors;  ///< sorted by name
  Digest module;                     ///< length 0 unless asked for
  ModuleState state = ModuleState::none;
  std::uint64_t version = 0;
};

}  // namespace refit
