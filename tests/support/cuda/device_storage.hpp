// DeviceStorage: a model's tensors in device memory, as PyTorch's allocators would hand it out.
//
// Its view is pinned host memory. upload() copies it to the device late, on a stream of its own:
// whoever reads the tensors before must wait for the fence. Memory that a daemon may still have
// open is not freed with the model but by free_retired(), once the daemon has ended.
#pragma once

#include <memory>
#include <vector>

#include "refit/device_memory.hpp"
#include "support/cuda/driver.hpp"
#include "support/model.hpp"

namespace refit::test {

enum class DeviceKind { legacy, vmm };

/// Device memory as a client has it, without the daemon: some bytes of one device.
class DeviceAllocation {
 public:
  /// `segments`: of vmm, side by side, as expandable_segments makes them.
  DeviceAllocation(DeviceKind kind, int device, std::uint64_t bytes, bool shareable = true,
                   std::uint64_t segments = 3);
  ~DeviceAllocation();
  DeviceAllocation(const DeviceAllocation&) = delete;
  DeviceAllocation& operator=(const DeviceAllocation&) = delete;

  [[nodiscard]] CUdeviceptr address() const { return address_; }
  [[nodiscard]] std::byte* pointer() const { return reinterpret_cast<std::byte*>(address_); }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }
  [[nodiscard]] int device() const { return device_; }

 private:
  DeviceKind kind_;
  int device_;
  CUdeviceptr address_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t segment_bytes_ = 0;   ///< of vmm
  std::uint64_t reserved_bytes_ = 0;  ///< of vmm
};

class DeviceStorage final : public ModelStorage {
 public:
  DeviceStorage(DeviceKind kind, int device, const std::vector<std::uint64_t>& tensor_bytes);
  ~DeviceStorage() override;

  [[nodiscard]] const std::vector<Place>& places() const override { return places_; }
  void upload() override;
  void settle() const override;
  void download() const override;
  [[nodiscard]] std::shared_ptr<DeviceFence> fence() const override { return fence_; }

  /// Work of this process on the tensors that takes a while and ends with other bytes in them.
  void scribble(unsigned char value);

  /// From now on uploads and scribbles begin late on a real driver too. When they do on the fake
  /// one is its schedule's to say.
  void run_late() { runs_late_ = true; }

  [[nodiscard]] CUstream stream() const { return stream_; }

  /// Frees what models that are gone have left. No daemon may have it open.
  static void free_retired();

 private:
  void fall_behind(int milliseconds) const;

  int device_;
  bool runs_late_ = false;
  CUstream stream_ = nullptr;
  std::byte* view_ = nullptr;
  std::vector<std::uint64_t> tensor_bytes_;
  std::vector<std::shared_ptr<DeviceAllocation>> allocations_;
  std::vector<Place> places_;
  std::shared_ptr<DeviceFence> fence_;
};

}  // namespace refit::test
