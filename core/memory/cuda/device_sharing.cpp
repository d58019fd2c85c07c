// A client's own device memory, by CUDA: what stands behind memory/device_sharing.hpp.
#include "memory/device_sharing.hpp"

#include <cstring>
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
        label_(std::move(label)) {
    claim_.kind = static_cast<RegionKind>(exported.kind);
    claim_.device = exported.device.bytes;
    claim_.allocation = exported.pieces.front().allocation_id;
    for (Piece& piece : exported.pieces) {
      DevicePiece one;
      one.bytes = piece.bytes;
      std::memcpy(one.handle.data(), piece.handle.data(), one.handle.size());
      one.fd = std::move(piece.fd);
      claim_.bytes += piece.bytes;
      claim_.pieces.push_back(std::move(one));
    }
  }

  [[nodiscard]] const DeviceClaim& claim() const noexcept override { return claim_; }
  [[nodiscard]] std::byte* address() const noexcept override {
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the driver's addresses are numbers
    return reinterpret_cast<std::byte*>(base_);
  }
  [[nodiscard]] Result<void> still_there() const override {
    REFIT_TRY_ASSIGN(const std::uint64_t now, identify(devices_->driver(), base_, label_));
    if (now == claim_.allocation) return {};
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
  std::string label_;
  DeviceClaim claim_;
};

class Event final : public SharedDeviceEvent {
 public:
  Event(std::shared_ptr<const Context> context, IpcEvent event, const IpcHandle& handle,
        CUstream stream, std::string label)
      : context_(std::move(context)),
        event_(std::move(event)),
        device_(context_->device().uuid.bytes),
        stream_(stream),
        label_(std::move(label)) {
    std::memcpy(handle_.data(), handle.data(), handle_.size());
  }

  [[nodiscard]] const refit::DeviceUuid& device() const noexcept override { return device_; }
  [[nodiscard]] const refit::IpcHandle& handle() const noexcept override { return handle_; }
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
  refit::DeviceUuid device_;
  refit::IpcHandle handle_;
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
  return std::static_pointer_cast<SharedDeviceMemory>(std::make_shared<cuda::Shared>(
      std::move(devices), std::move(context), base, std::move(exported), label));
}

Result<std::shared_ptr<SharedDeviceEvent>> share_device_event(const void* pointer, void* stream,
                                                              const std::string& label) {
  REFIT_TRY_ASSIGN(auto devices, cuda::own_devices());
  REFIT_TRY_ASSIGN(auto located, cuda::locate(*devices, cuda::address_of(pointer), 1, label));
  REFIT_TRY_ASSIGN(auto context, devices->context(*located.device));
  REFIT_TRY_ASSIGN(auto event, cuda::IpcEvent::create(context, label));
  REFIT_TRY_ASSIGN(const cuda::IpcHandle handle, event.handle(label));
  return std::static_pointer_cast<SharedDeviceEvent>(std::make_shared<cuda::Event>(
      std::move(context), std::move(event), handle, static_cast<CUstream>(stream), label));
}

}  // namespace refit
