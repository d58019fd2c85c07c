// Device memory that tensors live in, and the point up to which the caller's own work on it must be
// done before a refit.
//
// Nothing is copied or allocated here: the memory is the caller's, from whatever allocator. It must
// not be freed while the DeviceMemory lives, nor while the daemon has it open: that ends before
// unregister_module(), sleep() or a register_module() that replaces it returns. Needs a CUDA driver
// at run time only. Threads: any.
#pragma once

#include <cstddef>
#include <memory>
#include <string>

#include "refit/api.hpp"
#include "refit/memory.hpp"
#include "refit/result.hpp"

namespace refit {

class SharedDeviceMemory;
class SharedDeviceEvent;

class REFIT_API DeviceMemory final : public Memory {
 public:
  /// Shares the allocations that [pointer, pointer + bytes) lies in: by a legacy CUDA IPC handle or
  /// by fds, whatever the driver says of them. data() and bytes() are those of the allocations, so
  /// that tensors beside this one may lie in the same. Errors: Errc::bad_region names the
  /// allocator's setting to change; Errc::unsupported without a driver; Errc::cuda.
  /// @param label  names the memory in error messages.
  [[nodiscard]] static Result<std::shared_ptr<DeviceMemory>> share(
      const void* pointer, std::size_t bytes, const std::string& label = "refit");
  ~DeviceMemory() override;

  [[nodiscard]] REFIT_LOCAL const SharedDeviceMemory& shared() const noexcept { return *shared_; }

 private:
  explicit DeviceMemory(std::shared_ptr<SharedDeviceMemory> shared) noexcept;
  std::shared_ptr<SharedDeviceMemory> shared_;
};

/// Orders refits behind what a CUDA stream holds when the trainer calls refit(), or when the engine
/// answers its gate: nobody waits on a CPU where all of it is on a device.
class REFIT_API DeviceFence {
 public:
  /// @param on      memory of the stream's device.
  /// @param stream  a CUstream; null is the device's default stream. It outlives the fence.
  [[nodiscard]] static Result<std::shared_ptr<DeviceFence>> behind(const DeviceMemory& on,
                                                                   void* stream);
  ~DeviceFence();
  DeviceFence(const DeviceFence&) = delete;
  DeviceFence& operator=(const DeviceFence&) = delete;

  [[nodiscard]] REFIT_LOCAL SharedDeviceEvent& event() const noexcept { return *event_; }

 private:
  explicit DeviceFence(std::shared_ptr<SharedDeviceEvent> event) noexcept;
  std::shared_ptr<SharedDeviceEvent> event_;
};

}  // namespace refit
