#include "memory/cuda/device.hpp"

#include <algorithm>
#include <cstring>

namespace refit::cuda {

Context::~Context() {
  // Fails only where the driver is already gone, at the end of the process.
  static_cast<void>(driver_.primary_ctx_release(device_.ordinal));
}

Result<Current> Current::enter(const Context& context) {
  REFIT_TRY_CUDA(context.driver(), ctx_push_current(context.handle()),
                 context.device().label() + ": entering its context (cuCtxPushCurrent)");
  return Current(context.driver());
}

Current::~Current() {
  CUcontext popped = nullptr;
  if (driver_ != nullptr) static_cast<void>(driver_->ctx_pop_current(&popped));
}

Result<std::shared_ptr<VisibleDevices>> VisibleDevices::open() {
  REFIT_TRY_ASSIGN(const Driver* const driver, Driver::get());
  std::shared_ptr<VisibleDevices> devices(new VisibleDevices(*driver));
  REFIT_TRY(devices->read());
  return devices;
}

Result<void> VisibleDevices::read() {
  int count = 0;
  REFIT_TRY_CUDA(driver_, device_get_count(&count), "counting devices (cuDeviceGetCount)");
  for (int i = 0; i < count; ++i) {
    const std::string label = "device " + std::to_string(i);
    Device device;
    REFIT_TRY_CUDA(driver_, device_get(&device.ordinal, i), label + " (cuDeviceGet)");
    CUuuid uuid{};
    REFIT_TRY_CUDA(driver_, device_get_uuid(&uuid, device.ordinal),
                   label + ": its UUID (cuDeviceGetUuid)");
    std::memcpy(device.uuid.bytes.data(), uuid.bytes, sizeof uuid.bytes);
    char name[256] = {};
    REFIT_TRY_CUDA(driver_, device_get_name(name, sizeof name - 1, device.ordinal),
                   label + ": its name (cuDeviceGetName)");
    device.name = name;
    std::size_t bytes = 0;
    REFIT_TRY_CUDA(driver_, device_total_mem(&bytes, device.ordinal),
                   label + ": its memory (cuDeviceTotalMem)");
    device.memory_bytes = bytes;
    const auto ask = [&](CUdevice_attribute which) -> Result<int> {
      int value = 0;
      const CUresult code = driver_.device_get_attribute(&value, which, device.ordinal);
      // A driver that does not know an attribute does not have what it stands for.
      if (code == CUDA_ERROR_INVALID_VALUE) return 0;
      if (code == CUDA_SUCCESS) return value;
      return fail_cuda(
          driver_, label + ": its attribute " + std::to_string(which) + " (cuDeviceGetAttribute)",
          code);
    };
    REFIT_TRY_ASSIGN(const int mode, ask(CU_DEVICE_ATTRIBUTE_COMPUTE_MODE));
    device.compute_mode = static_cast<CUcomputemode>(mode);
    for (const auto& [which, has] :
         {std::pair{CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED, &device.vmm},
          std::pair{CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED,
                    &device.posix_fd_handles},
          std::pair{CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, &device.ipc_events},
          std::pair{CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, &device.unified_addressing},
          std::pair{CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED,
                    &device.read_only_host_register},
          std::pair{CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM,
                    &device.host_pointers}}) {
      REFIT_TRY_ASSIGN(const int value, ask(which));
      *has = value != 0;
    }
    devices_.push_back(std::move(device));
  }
  for (Device& device : devices_) {
    for (const Device& peer : devices_) {
      int can = 0;
      if (peer.ordinal != device.ordinal &&
          driver_.device_can_access_peer(&can, peer.ordinal, device.ordinal) == CUDA_SUCCESS &&
          can != 0)
        device.peers.push_back(peer.ordinal);
    }
  }
  contexts_.resize(devices_.size());
  return {};
}

const Device* VisibleDevices::find(const DeviceUuid& uuid) const noexcept {
  const auto found = std::find_if(devices_.begin(), devices_.end(),
                                  [&](const Device& device) { return device.uuid == uuid; });
  return found == devices_.end() ? nullptr : &*found;
}

const Device* VisibleDevices::find(CUdevice ordinal) const noexcept {
  const auto found = std::find_if(devices_.begin(), devices_.end(),
                                  [&](const Device& device) { return device.ordinal == ordinal; });
  return found == devices_.end() ? nullptr : &*found;
}

Result<std::shared_ptr<const Context>> VisibleDevices::context(const Device& device) {
  const auto index = static_cast<std::size_t>(&device - devices_.data());
  REFIT_ASSERT(index < devices_.size());
  const std::lock_guard lock(mutex_);
  std::shared_ptr<const Context>& context = contexts_[index];
  if (context != nullptr) return context;
  CUcontext handle = nullptr;
  const CUresult code = driver_.primary_ctx_retain(&handle, device.ordinal);
  if (code != CUDA_SUCCESS) {
    std::string what = device.label() + ": retaining its context (cuDevicePrimaryCtxRetain)";
    if (device.compute_mode != CU_COMPUTEMODE_DEFAULT)
      what += "; its compute mode lets one process in, or none: nvidia-smi -c DEFAULT lets several";
    return fail_cuda(driver_, what, code);
  }
  context = std::make_shared<const Context>(driver_, device, handle);
  return context;
}

}  // namespace refit::cuda
