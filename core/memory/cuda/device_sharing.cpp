// A client's own device memory, by CUDA: what stands behind memory/device_sharing.hpp.
#include "memory/device_sharing.hpp"

#include <mutex>
#include <utility>

#include "memory/cuda/event.hpp"
#include "memory/cuda/export.hpp"

namespace refit {
namespace cuda {
namespace {

CUdeviceptr address_of(const void* pointer) noexcept {
  return reinterpret_cast<CUdeviceptr>(pointer);
}

/// This process's devices, for as long as anybody has something of them.
Result<std::shared_ptr<VisibleDevices>> own_devices() {
  static std::mutex mutex;
  static std::weak_ptr<VisibleDevices> known;
  const std::lock_guard lock(mutex);
  if (auto devices = known.lock()) return devices;
  REFIT_TRY_ASSIGN(auto devices, VisibleDevices::open());
  known = devices;
  return devices;
}

class Shared final : public SharedDeviceMemory {
 public:
  Shared(std::shared_ptr<VisibleDevices> devices, std::shared_ptr<const Context> context,
         CUdeviceptr base, Exported exported, std::string label)
      : devices_(std::move(devices)),
        context_(std::move(context)),
        base_(base),
        exported_(std::move(exported)),
        label_(std::move(label)) {}

  [[nodiscard]] const Exported& exported() const noexcept override { return exported_; }
  [[nodiscard]] std::byte* address() const noexcept override {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are numbers
    return reinterpret_cast<std::byte*>(base_);
  }
  [[nodiscard]] Result<void> still_there() const override {
    REFIT_TRY_ASSIGN(const std::uint64_t now, identify(devices_->driver(), base_, label_));
    if (now == exported_.pieces.front().allocation_id) return {};
    return fail(Errc::bad_region,
                label_ +
                    ": the device memory that was shared has been freed, and other memory "
                    "has its address; share it anew and register the module again");
  }
  [[nodiscard]] Result<void> synchronize() const override {
    const Driver& driver = devices_->driver();
    REFIT_TRY_ASSIGN(const Current current, Current::enter(*context_));
    REFIT_TRY_CUDA(driver, ctx_synchronize(), label_ + ": waiting for the device");
    return {};
  }

 private:
  std::shared_ptr<VisibleDevices> devices_;
  std::shared_ptr<const Context> context_;
  CUdeviceptr base_;
  Exported exported_;
  std::string label_;
};

class Event final : public SharedDeviceEvent {
 public:
  Event(std::shared_ptr<const Context> context, IpcEvent event, const IpcHandle& handle,
        CUstream stream, std::string label)
      : context_(std::move(context)),
        event_(std::move(event)),
        handle_(handle),
        stream_(stream),
        label_(std::move(label)) {}

  [[nodiscard]] const DeviceUuid& device() const noexcept override {
    return context_->device().uuid;
  }
  [[nodiscard]] const IpcHandle& handle() const noexcept override { return handle_; }
  [[nodiscard]] Result<void> record() override {
    const Driver& driver = context_->driver();
    REFIT_TRY_ASSIGN(const Current current, Current::enter(*context_));
    REFIT_TRY_CUDA(driver, event_record(event_.get(), stream_),
                   label_ + ": recording its event (cuEventRecord)");
    return {};
  }
  [[nodiscard]] Result<void> synchronize() override {
    const Driver& driver = context_->driver();
    REFIT_TRY_ASSIGN(const Current current, Current::enter(*context_));
    REFIT_TRY_CUDA(driver, event_synchronize(event_.get()),
                   label_ + ": waiting for its event (cuEventSynchronize)");
    return {};
  }

 private:
  std::shared_ptr<const Context> context_;
  IpcEvent event_;
  IpcHandle handle_;
  CUstream stream_;
  std::string label_;
};

}  // namespace
}  // namespace cuda

Result<std::shared_ptr<SharedDeviceMemory>> share_device_memory(const void* pointer,
                                                                std::uint64_t bytes,
                                                                const std::string& label) {
  REFIT_TRY_ASSIGN(auto devices, cuda::own_devices());
  const CUdeviceptr address = cuda::address_of(pointer);
  REFIT_TRY_ASSIGN(auto exported, cuda::export_memory(*devices, address, bytes, label));
  REFIT_TRY_ASSIGN(auto context, devices->context(*devices->find(exported.device)));
  const CUdeviceptr base = address - exported.offset;
  // Whole allocations, so that other tensors beside this range may lie in the same region.
  exported.offset = 0;
  exported.bytes = 0;
  for (const DevicePiece& piece : exported.pieces) exported.bytes += piece.bytes;
  return std::static_pointer_cast<SharedDeviceMemory>(std::make_shared<cuda::Shared>(
      std::move(devices), std::move(context), base, std::move(exported), label));
}

Result<std::shared_ptr<SharedDeviceEvent>> share_device_event(const void* pointer, void* stream,
                                                              const std::string& label) {
  REFIT_TRY_ASSIGN(auto devices, cuda::own_devices());
  REFIT_TRY_ASSIGN(auto located, cuda::locate(*devices, cuda::address_of(pointer), 1, label));
  REFIT_TRY_ASSIGN(auto context, devices->context(*located.device));
  REFIT_TRY_ASSIGN(auto event, cuda::IpcEvent::create(context, label));
  REFIT_TRY_ASSIGN(const IpcHandle handle, event.handle(label));
  return std::static_pointer_cast<SharedDeviceEvent>(std::make_shared<cuda::Event>(
      std::move(context), std::move(event), handle, static_cast<CUstream>(stream), label));
}

}  // namespace refit
