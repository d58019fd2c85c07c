// From verified FlatBuffers to the daemon's own values, with a bound on everything that is counted.
//
// Pure. A payload that verifies may still be nonsense: what is checked here is shape (counts,
// presence, enum ranges); what the values mean is checked by Manifest and Plan.
#pragma once

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "ipc/wire.hpp"
#include "memory/exported.hpp"
#include "plan/plan.hpp"
#include "refit/result.hpp"
#include "refit/types.hpp"
#include "server/clock.hpp"

namespace refit::daemon {

/// When a request that arrived then is late; an hour at most.
Clock::time_point deadline_after(Clock::time_point arrived, std::uint64_t deadline_us);

inline constexpr std::size_t kNameBytesMax = 256;  ///< of sessions, engines and modules

/// A name of a session, engine or module: 1 to 256 printable bytes without '/', which separates
/// engine and module.
Result<std::string> decode_name(const flatbuffers::String* text, const char* what);

using Names = flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>;

/// A list of tensor names, bounded before a byte of it is copied: many offsets of a small message
/// may name one long string. Errors: Errc::quota, Errc::bad_argument for a name that stands twice.
Result<std::vector<std::string>> decode_tensor_names(const Names* names, const char* what);

/// The SHA-256 that tensors shall have; Errc::bad_argument for XXH3, for a value that is no SHA-256
/// and for a name that stands twice, Errc::quota for too many or too long names. `what` begins the
/// messages.
Result<std::vector<std::pair<std::string, Digest>>> decode_expected(
    const flatbuffers::Vector<flatbuffers::Offset<wire::ExpectedDigest>>* list, std::uint8_t kind,
    const char* what);

struct RegionClaim {
  std::uint64_t ticket = 0;  ///< of host memory
  std::uint64_t bytes = 0;
  bool pool = false;
  std::optional<Exported> device;            ///< of device memory; its fds have not come yet
  std::vector<std::uint64_t> piece_tickets;  ///< of a VMM range, as its pieces
};

/// An interprocess event of the client's.
struct EventClaim {
  DeviceUuid device;
  IpcHandle handle{};
};

struct RegisterRequest {
  std::string module;
  std::vector<RegionClaim> regions;
  std::vector<TensorSpec> tensors;
  std::vector<NameRule> name_map;
  std::uint64_t version = 0;
  TransactionId transaction;
  bool poisoned = false;
  std::uint64_t selection = 0;
  bool asleep = false;                       ///< no memory: name and state alone
  std::vector<std::uint64_t> layer_buffers;  ///< their bytes
  std::uint32_t residency_base = 0;
  std::optional<EventClaim> event;
};
Result<RegisterRequest> decode(const wire::RegisterModule& message, const ManifestLimits& limits);

}  // namespace refit::daemon
