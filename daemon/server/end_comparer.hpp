// EndComparer: whether the bytes at both ends of a plan's copies are equal, by XXH3-128.
//
// One thread; keeps its buffers, so that a second comparison allocates nothing where all memory is
// the host's. Reads memory that its owners may change: what an answer is worth is the caller's to
// know.
#pragma once

#include <cstdint>
#include <functional>
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
    unreadable,  ///< memory that faulted, or a device that did not answer
    stopped,
  };

  explicit EndComparer(DeviceAccess& devices) : devices_(devices) {}

  /// Compares until `go_on`, which is asked before each block of about a MiB, says no.
  [[nodiscard]] Answer compare(const BoundPlan& plan, const std::function<bool()>& go_on);

 private:
  /// One end of a copy: where it is, and the shape in which its bytes lie there.
  struct End {
    Hasher hasher{DigestKind::xxh3};
    TensorSpec bytes;
    std::vector<std::byte> read;  ///< what came from a device
    const std::byte* data = nullptr;
  };

  [[nodiscard]] Answer compare_block(const CopyOp& block, const MappedRegion& source,
                                     const MappedRegion& target);
  [[nodiscard]] bool fetch(End& end, const MappedRegion& region, const std::byte* begin);

  DeviceAccess& devices_;
  std::vector<GuardedRange> ranges_;
  End source_, target_;
};

}  // namespace refit::daemon
