// The driver as a trainer or an engine uses it: a context, a stream, and device memory that can be
// shared with another process.
//
// A table of its own, by the exported names, so that the bench needs nothing of what it measures.
// One thread, whose current context is the first device's primary one for as long as a Cuda lives.
// Nothing here is timed.
#pragma once

#include <cuda.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit::bench {

// cuda.h's macros turn these into the names that the library exports (cuMemAlloc_v2).
#define REFIT_BENCH_CUDA(X)         \
  X(cuInit)                         \
  X(cuDeviceGet)                    \
  X(cuDevicePrimaryCtxRetain)       \
  X(cuDevicePrimaryCtxRelease)      \
  X(cuCtxSetCurrent)                \
  X(cuCtxSynchronize)               \
  X(cuStreamCreate)                 \
  X(cuStreamDestroy)                \
  X(cuMemAlloc)                     \
  X(cuMemFree)                      \
  X(cuIpcGetMemHandle)              \
  X(cuIpcOpenMemHandle)             \
  X(cuIpcCloseMemHandle)            \
  X(cuMemGetAllocationGranularity)  \
  X(cuMemCreate)                    \
  X(cuMemRelease)                   \
  X(cuMemAddressReserve)            \
  X(cuMemAddressFree)               \
  X(cuMemMap)                       \
  X(cuMemUnmap)                     \
  X(cuMemSetAccess)                 \
  X(cuMemExportToShareableHandle)   \
  X(cuMemImportFromShareableHandle) \
  X(cuMemHostRegister)              \
  X(cuMemHostUnregister)            \
  X(cuMemcpyHtoD)                   \
  X(cuMemcpyDtoH)                   \
  X(cuMemcpyDtoD)

class Cuda {
 public:
  /// Errors: unsupported without a driver; cuda.
  static Result<std::shared_ptr<Cuda>> open();
  ~Cuda();
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  [[nodiscard]] CUstream stream() const noexcept { return stream_; }

#define REFIT_X(name) decltype(&::name) name = nullptr;
  REFIT_BENCH_CUDA(REFIT_X)
#undef REFIT_X

 private:
  Cuda() = default;
  Result<void> load();
  CUdevice device_ = 0;
  CUcontext context_ = nullptr;
  CUstream stream_ = nullptr;
};

/// Errors: cuda, with the call's name and its code.
[[nodiscard]] Result<void> check(CUresult code, const char* call);

/// Returns that error from the enclosing function unless the driver's call succeeds.
#define REFIT_BENCH_TRY_CUDA(cuda, call, ...) \
  REFIT_TRY(::refit::bench::check((cuda).call(__VA_ARGS__), #call))

enum class Sharing { legacy, vmm };

/// Device memory, allocated here or opened from what another process of the bench allocated.
class DeviceBuffer {
 public:
  static Result<DeviceBuffer> allocate(std::shared_ptr<Cuda> cuda, Sharing sharing,
                                       std::uint64_t bytes);
  static Result<DeviceBuffer> open(std::shared_ptr<Cuda> cuda, const nlohmann::json& how,
                                   UniqueFd fd);
  ~DeviceBuffer();
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  [[nodiscard]] CUdeviceptr address() const noexcept { return address_; }
  [[nodiscard]] std::byte* pointer() const noexcept {
    return reinterpret_cast<std::byte*>(address_);  // NOLINT(performance-no-int-to-ptr): API
  }
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// For open(): beside it goes the fd, of vmm memory.
  [[nodiscard]] Result<std::pair<nlohmann::json, UniqueFd>> share() const;

 private:
  DeviceBuffer() = default;
  void swap(DeviceBuffer& other) noexcept;
  Result<void> map();

  std::shared_ptr<Cuda> cuda_;
  Sharing sharing_ = Sharing::legacy;
  bool opened_ = false;  ///< it is another process's
  CUdeviceptr address_ = 0;
  std::uint64_t bytes_ = 0;
  CUmemGenericAllocationHandle handle_ = 0;  ///< of vmm
  bool mapped_ = false;                      ///< of vmm
};

/// Pins host memory for as long as it lives.
class PinnedRange {
 public:
  static Result<PinnedRange> make(std::shared_ptr<Cuda> cuda, std::byte* data, std::uint64_t bytes);
  ~PinnedRange();
  PinnedRange(PinnedRange&& other) noexcept
      : cuda_(std::move(other.cuda_)), data_(std::exchange(other.data_, nullptr)) {}
  PinnedRange& operator=(PinnedRange&&) = delete;

 private:
  PinnedRange(std::shared_ptr<Cuda> cuda, std::byte* data) : cuda_(std::move(cuda)), data_(data) {}
  std::shared_ptr<Cuda> cuda_;
  std::byte* data_;
};

}  // namespace refit::bench
