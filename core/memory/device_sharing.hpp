// What a client does with its own GPU memory, without a word of CUDA: say where it is so that the
// daemon reaches it, and mark where its own work on it ends.
//
// Behind it stands core/memory/cuda, or a word that it is not there. Any thread.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "memory/exported.hpp"
#include "refit/result.hpp"

namespace refit {

/// Whole allocations of this process, exported once. They must not be freed while it lives.
class SharedDeviceMemory {
 public:
  virtual ~SharedDeviceMemory() = default;
  /// What the daemon is told: the allocations from the first one's begin to the last one's end. The
  /// fds stay this object's.
  [[nodiscard]] virtual const Exported& exported() const noexcept = 0;
  /// Of the first allocation.
  [[nodiscard]] virtual std::byte* address() const noexcept = 0;
  /// Other memory has the address now: what was shared was freed behind this object's back. Errors:
  /// Errc::bad_region.
  [[nodiscard]] virtual Result<void> still_there() const = 0;
  /// Waits until the device has done all that was queued for it in this process.
  [[nodiscard]] virtual Result<void> synchronize() const = 0;
};

/// Shares what [pointer, pointer + bytes) lies in. Errors: Errc::bad_region with what to do,
/// Errc::unsupported, Errc::cuda; `label` names the memory.
[[nodiscard]] Result<std::shared_ptr<SharedDeviceMemory>> share_device_memory(
    const void* pointer, std::uint64_t bytes, const std::string& label);

/// An event of this process that the daemon waits for.
class SharedDeviceEvent {
 public:
  virtual ~SharedDeviceEvent() = default;
  [[nodiscard]] virtual const DeviceUuid& device() const noexcept = 0;
  [[nodiscard]] virtual const IpcHandle& handle() const noexcept = 0;
  /// Marks the end of what its stream holds now. Allocates nothing unless it fails.
  [[nodiscard]] virtual Result<void> record() = 0;
  /// Waits for what was recorded last.
  [[nodiscard]] virtual Result<void> synchronize() = 0;
};

/// An event for `stream`, a CUstream of the device that `pointer` is on (null: its default stream).
[[nodiscard]] Result<std::shared_ptr<SharedDeviceEvent>> share_device_event(
    const void* pointer, void* stream, const std::string& label);

}  // namespace refit
