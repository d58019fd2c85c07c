// MadeMemory: memory of every kind that a client may hand in, made by hand on the fake driver.
//
// It holds the primary context of its device, and frees all in its destructor. One thread.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <utility>
#include <vector>

#include "unit/fake_cuda/cuda_api.hpp"

namespace refit::cuda::test {

using fakecuda::test::cuda;

inline constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

enum class Kind : std::uint32_t {
  allocation,           ///< cuMemAlloc
  segments,             ///< cuMemCreate, several in one range, with an fd for each
  segments_without_fd,  ///< the same without a shareable handle type
  managed,
  pool,
  pinned,
  pageable,
  nothing,
};

/// What byte `index` of any memory is; differs between neighbours and between segments.
inline unsigned char pattern(std::uint64_t index) {
  return static_cast<unsigned char>(index * 7 + index / 251 + index / kMiB);
}

/// Ends the process if `result` is not success: a test that cannot make its memory says nothing.
inline void must(CUresult result) {
  if (result != CUDA_SUCCESS) std::abort();
}

class MadeMemory {
 public:
  /// @param bytes  of each segment.
  explicit MadeMemory(Kind kind, std::uint64_t bytes, std::uint32_t segments = 1, int device = 0)
      : kind_(kind), bytes_(bytes * segments), segment_bytes_(bytes), device_(device) {
    must(cuda().cuInit(0));
    CUcontext context = nullptr;
    must(cuda().cuDevicePrimaryCtxRetain(&context, device));
    must(cuda().cuCtxPushCurrent(context));
    make();
    if (kind == Kind::allocation || kind == Kind::segments) {
      std::vector<unsigned char> all(bytes_);
      for (std::uint64_t i = 0; i < bytes_; ++i) all[i] = pattern(i);
      must(cuda().cuMemcpyHtoD(address_, all.data(), bytes_));
    }
    must(cuda().cuCtxPopCurrent(&context));
  }
  ~MadeMemory() {
    CUcontext context = nullptr;
    must(cuda().cuDevicePrimaryCtxRetain(&context, device_));
    must(cuda().cuCtxPushCurrent(context));
    free();
    must(cuda().cuCtxPopCurrent(&context));
    must(cuda().cuDevicePrimaryCtxRelease(device_));
    must(cuda().cuDevicePrimaryCtxRelease(device_));
  }
  MadeMemory(const MadeMemory&) = delete;
  MadeMemory& operator=(const MadeMemory&) = delete;

  [[nodiscard]] CUdeviceptr address() const { return address_; }
  [[nodiscard]] std::uint64_t bytes() const { return bytes_; }

 private:
  void make() {
    void* host = nullptr;
    switch (kind_) {
      case Kind::allocation:
        must(cuda().cuMemAlloc(&address_, bytes_));
        return;
      case Kind::managed:
        must(cuda().cuMemAllocManaged(&address_, bytes_, CU_MEM_ATTACH_GLOBAL));
        return;
      case Kind::pool: {
        CUstream stream = nullptr;
        must(cuda().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
        must(cuda().cuMemAllocAsync(&address_, bytes_, stream));
        must(cuda().cuStreamDestroy(stream));
        return;
      }
      case Kind::pinned:
        must(cuda().cuMemHostAlloc(&host, bytes_, 0));
        address_ = reinterpret_cast<CUdeviceptr>(host);
        return;
      case Kind::pageable:
        pageable_.resize(bytes_);
        address_ = reinterpret_cast<CUdeviceptr>(pageable_.data());
        return;
      case Kind::nothing:
        address_ = 0x1000;
        return;
      case Kind::segments:
      case Kind::segments_without_fd:
        map();
        return;
    }
  }
  void map() {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device_;
    if (kind_ == Kind::segments)
      properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    must(cuda().cuMemAddressReserve(&address_, bytes_, 0, 0, 0));
    for (std::uint64_t at = 0; at < bytes_; at += segment_bytes_) {
      CUmemGenericAllocationHandle handle = 0;
      must(cuda().cuMemCreate(&handle, segment_bytes_, &properties, 0));
      must(cuda().cuMemMap(address_ + at, segment_bytes_, 0, handle, 0));
      must(cuda().cuMemRelease(handle));
    }
    CUmemAccessDesc access{};
    access.location = properties.location;
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    must(cuda().cuMemSetAccess(address_, bytes_, &access, 1));
  }
  void free() const {
    switch (kind_) {
      case Kind::allocation:
      case Kind::managed:
      case Kind::pool:
        must(cuda().cuMemFree(address_));
        return;
      case Kind::pinned:
        must(cuda().cuMemFreeHost(reinterpret_cast<void*>(address_)));
        return;
      case Kind::segments:
      case Kind::segments_without_fd:
        must(cuda().cuMemUnmap(address_, bytes_));
        must(cuda().cuMemAddressFree(address_, bytes_));
        return;
      case Kind::pageable:
      case Kind::nothing:
        return;
    }
  }

  Kind kind_;
  std::uint64_t bytes_;
  std::uint64_t segment_bytes_;
  int device_;
  CUdeviceptr address_ = 0;
  std::vector<std::byte> pageable_;
};

}  // namespace refit::cuda::test
