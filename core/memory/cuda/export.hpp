// What another process needs to reach a range of this one's device memory: found by asking the
// driver about the pointer, whatever allocated it.
//
// Any thread; each call may take milliseconds, so it is for registration. Nothing is kept: what was
// exported must not be freed before the importer gave it up (of legacy memory that is undefined
// behaviour, and nobody can revoke a handle).
#pragma once

#include <cstdint>
#include <string>

#include "memory/cuda/device.hpp"
#include "memory/exported.hpp"

namespace refit::cuda {

/// Consecutive allocations that hold a range of addresses.
struct Located {
  struct Segment {
    CUdeviceptr base = 0;
    std::uint64_t bytes = 0;
    std::uint64_t allocation_id = 0;
  };
  const Device* device = nullptr;
  /// What another process can reach it by; local where it cannot.
  RegionKind kind = RegionKind::cuda_local;
  std::vector<Segment> segments;  ///< several only for cuMemCreate's memory
};

/// Finds the allocations of [pointer, pointer + bytes). Errors: Errc::bad_argument for 0 bytes or
/// a range that overflows; Errc::bad_region for what is no device memory, managed memory, and a
/// range that leaves its allocation; Errc::cuda. The message says what to do; `label` names the
/// memory in it.
[[nodiscard]] Result<Located> locate(VisibleDevices& devices, CUdeviceptr pointer,
                                     std::uint64_t bytes, const std::string& label);

/// Makes [pointer, pointer + bytes) reachable for another process: cuMemAlloc's memory (PyTorch's
/// default) by a legacy handle, cuMemCreate's (expandable segments) by fds, which the result owns.
/// Errors: those of locate(), and Errc::bad_region for memory whose allocator does not let it be
/// shared, with the setting to change.
/// @param same_process  the importer is in this very process, where opening a handle fails: the
///                      result is the address, and no allocator is refused.
[[nodiscard]] Result<Exported> export_memory(VisibleDevices& devices, CUdeviceptr pointer,
                                             std::uint64_t bytes, const std::string& label,
                                             bool same_process = false);

/// The allocation that `pointer` lies in now. Another number than when it was exported: the memory
/// was freed, and other memory has its address. Cheap: one question to the driver. Errors:
/// Errc::bad_region if it lies in none.
[[nodiscard]] Result<std::uint64_t> identify(const Driver& driver, CUdeviceptr pointer,
                                             const std::string& label);

}  // namespace refit::cuda
