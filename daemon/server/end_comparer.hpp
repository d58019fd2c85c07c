// EndComparer: whether the bytes at both ends of a plan's copies are equal, by XXH3-128.
//
// One thread; keeps its buffers, so that a second comparison allocates nothing where all memory is
// the host's. Reads memory that its owners may change: what an answer is worth is the caller's to
// know. Layers are read where they are on a device, if they are there and stay for long enough;
// those that are absent stand against nothing.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "digest/digest.hpp"
#include "memory/sigbus_guard.hpp"
#include "server/device_access.hpp"
#include "server/plan_cache.hpp"

namespace refit::daemon {

class EndComparer {
 public:
  enum class Answer {
    equal,
    different,
    unreadable,  ///< memory that faulted, a device that did not answer, a word of nonsense
    stopped,
  };

  explicit EndComparer(DeviceAccess& devices) : devices_(devices) {}

  using GoOn = std::function<bool()>;
  /// Compares until `go_on`, which is asked before each block of about a MiB, says no. `engine` has
  /// the words that say where layers are.
  [[nodiscard]] Answer compare(const BoundPlan& plan, const RequestRegion& engine,
                               const GoOn& go_on);

 private:
  /// One end of a copy: where it is, and the shape in which its bytes lie there.
  struct End {
    Hasher hasher{DigestKind::xxh3};
    TensorSpec bytes;
    std::vector<std::byte> read;  ///< what came from a device
    const std::byte* data = nullptr;
  };

  [[nodiscard]] Answer compare_layer(const BoundPlan& plan, const RequestRegion& engine,
                                     std::span<const Copy> copies, const GoOn& go_on);
  [[nodiscard]] Answer compare_copy(const BoundPlan& plan, const Copy& copy,
                                    const MappedRegion& target, std::uint64_t target_offset,
                                    const GoOn& go_on);
  [[nodiscard]] Answer compare_block(const CopyOp& block, const MappedRegion& source,
                                     const MappedRegion& target);
  [[nodiscard]] bool fetch(End& end, const MappedRegion& region, const std::byte* begin);

  DeviceAccess& devices_;
  std::vector<GuardedRange> ranges_;
  End source_, target_;
};

}  // namespace refit::daemon
