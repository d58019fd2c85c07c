#include "refit/device_memory.hpp"

#include "memory/device_sharing.hpp"

namespace refit {

DeviceMemory::DeviceMemory(std::shared_ptr<SharedDeviceMemory> shared) noexcept
    : Memory(shared->address(), shared->exported().bytes), shared_(std::move(shared)) {}
DeviceMemory::~DeviceMemory() = default;

Result<std::shared_ptr<DeviceMemory>> DeviceMemory::share(const void* pointer, std::size_t bytes,
                                                          const std::string& label) {
  REFIT_TRY_ASSIGN(auto shared, share_device_memory(pointer, bytes, label));
  return std::shared_ptr<DeviceMemory>(new DeviceMemory(std::move(shared)));
}

DeviceFence::DeviceFence(std::shared_ptr<SharedDeviceEvent> event) noexcept
    : event_(std::move(event)) {}
DeviceFence::~DeviceFence() = default;

Result<std::shared_ptr<DeviceFence>> DeviceFence::behind(const DeviceMemory& on, void* stream) {
  REFIT_TRY_ASSIGN(auto event, share_device_event(on.data(), stream, "a fence"));
  return std::shared_ptr<DeviceFence>(new DeviceFence(std::move(event)));
}

}  // namespace refit
