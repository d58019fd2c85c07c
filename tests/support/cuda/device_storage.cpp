#include "support/cuda/device_storage.hpp"

#include <chrono>
#include <mutex>
#include <thread>

#include "support/must.hpp"

namespace refit::test {
namespace {

using cuda::Current;
using cuda::Driver;

const Driver& driver() { return Driver::get(); }

/// What a daemon may still have open of a model that is gone.
struct Retired {
  std::vector<std::shared_ptr<DeviceAllocation>> allocations;
  std::shared_ptr<DeviceFence> fence;
  CUstream stream = nullptr;
  int device = 0;
};
std::vector<Retired>& retired() {
  static std::vector<Retired> all;
  return all;
}
std::mutex retired_mutex;

CUmemAllocationProp properties_of(int device, bool shareable) {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device;
  properties.requestedHandleTypes =
      shareable ? CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR : CU_MEM_HANDLE_TYPE_NONE;
  return properties;
}

std::uint64_t rounded(std::uint64_t bytes, std::uint64_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

// ---- one allocation

DeviceAllocation::DeviceAllocation(DeviceKind kind, int device, std::uint64_t bytes, bool shareable,
                                   std::uint64_t segments)
    : kind_(kind), device_(device), bytes_(bytes) {
  const Current current(device);
  if (kind == DeviceKind::legacy) {
    // A real driver cuts small ones from blocks of this size and shares the block; allocators like
    // PyTorch's ask for no less.
    constexpr std::uint64_t kBlock = std::uint64_t{2} << 20;
    if (!Driver::fake()) bytes_ = rounded(bytes, kBlock);
    cuda::must(driver().cuMemAlloc(&address_, bytes_), "cuMemAlloc");
    return;
  }
  const CUmemAllocationProp properties = properties_of(device, shareable);
  std::size_t granularity = 0;
  cuda::must(driver().cuMemGetAllocationGranularity(&granularity, &properties,
                                                    CU_MEM_ALLOC_GRANULARITY_MINIMUM),
             "cuMemGetAllocationGranularity");
  segment_bytes_ = rounded((bytes + segments - 1) / segments, granularity);
  bytes_ = segment_bytes_ * segments;
  // Nothing is mapped behind it, so that its end is an end wherever the next one is placed.
  reserved_bytes_ = bytes_ + granularity;
  cuda::must(driver().cuMemAddressReserve(&address_, reserved_bytes_, 0, 0, 0),
             "cuMemAddressReserve");
  for (std::uint64_t i = 0; i < segments; ++i) {
    CUmemGenericAllocationHandle handle = 0;
    cuda::must(driver().cuMemCreate(&handle, segment_bytes_, &properties, 0), "cuMemCreate");
    cuda::must(driver().cuMemMap(address_ + i * segment_bytes_, segment_bytes_, 0, handle, 0),
               "cuMemMap");
    cuda::must(driver().cuMemRelease(handle), "cuMemRelease");
  }
  CUmemAccessDesc access{};
  access.location = properties.location;
  access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  cuda::must(driver().cuMemSetAccess(address_, bytes_, &access, 1), "cuMemSetAccess");
}

DeviceAllocation::~DeviceAllocation() {
  const Current current(device_);
  if (kind_ == DeviceKind::legacy) {
    cuda::must(driver().cuMemFree(address_), "cuMemFree");
    return;
  }
  for (std::uint64_t at = 0; at < bytes_; at += segment_bytes_)
    cuda::must(driver().cuMemUnmap(address_ + at, segment_bytes_), "cuMemUnmap");
  cuda::must(driver().cuMemAddressFree(address_, reserved_bytes_), "cuMemAddressFree");
}

// ---- tensors in several of them

DeviceStorage::DeviceStorage(DeviceKind kind, int device,
                             const std::vector<std::uint64_t>& tensor_bytes)
    : device_(device), tensor_bytes_(tensor_bytes) {
  // As a caching allocator cuts its blocks: somebody else's bytes first, starts at 512.
  constexpr std::uint64_t kHead = 4096 + 512;
  constexpr std::uint64_t kAlign = 512;
  const std::size_t blocks = kind == DeviceKind::legacy ? 3 : 1;
  std::vector<std::uint64_t> block_bytes(blocks, kHead);
  std::vector<std::uint64_t> offsets;
  std::uint64_t view_bytes = 0;
  for (std::size_t i = 0; i < tensor_bytes.size(); ++i) {
    std::uint64_t& end = block_bytes[i % blocks];
    offsets.push_back(end);
    end += rounded(tensor_bytes[i], kAlign);
    view_bytes += rounded(tensor_bytes[i], kAlign);
  }
  std::vector<std::shared_ptr<DeviceMemory>> shared;
  for (std::size_t i = 0; i < std::min(blocks, std::max<std::size_t>(1, tensor_bytes.size()));
       ++i) {
    auto block = std::make_shared<DeviceAllocation>(kind, device, block_bytes[i] + kAlign);
    // By what lies inside of it, as a tensor would: of the legacy kind all of it is shared by that.
    const std::uint64_t begin = kind == DeviceKind::legacy ? kHead : 0;
    shared.push_back(must(DeviceMemory::share(block->pointer() + begin, block->bytes() - begin)));
    allocations_.push_back(std::move(block));
  }
  const Current current(device);
  cuda::must(driver().cuStreamCreate(&stream_, CU_STREAM_NON_BLOCKING), "cuStreamCreate");
  fence_ = must(DeviceFence::behind(*shared.front(), stream_));
  void* view = nullptr;
  cuda::must(driver().cuMemHostAlloc(&view, std::max<std::uint64_t>(view_bytes, 1),
                                     CU_MEMHOSTALLOC_PORTABLE),
             "cuMemHostAlloc");
  view_ = static_cast<std::byte*>(view);
  std::uint64_t at = 0;
  for (std::size_t i = 0; i < tensor_bytes.size(); ++i) {
    const auto& block = allocations_[i % blocks];
    places_.push_back({shared[i % blocks], block->pointer() + offsets[i], view_ + at});
    at += rounded(tensor_bytes[i], kAlign);
  }
  std::memset(view_, 0, view_bytes);
  upload();
  settle();
}

void DeviceStorage::fall_behind(int milliseconds) const {
  if (!runs_late_ || driver().cuLaunchHostFunc == nullptr) return;
  const auto wait = [](void* ms) {
    std::this_thread::sleep_for(
        std::chrono::milliseconds(reinterpret_cast<std::intptr_t>(ms)));  // no address
  };
  cuda::must(driver().cuLaunchHostFunc(
                 stream_, wait, reinterpret_cast<void*>(static_cast<std::intptr_t>(milliseconds))),
             "cuLaunchHostFunc");
}

void DeviceStorage::upload() {
  const Current current(device_);
  fall_behind(20);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    if (tensor_bytes_[i] == 0) continue;
    cuda::must(driver().cuMemcpyHtoDAsync(reinterpret_cast<CUdeviceptr>(places_[i].address),
                                          places_[i].view, tensor_bytes_[i], stream_),
               "cuMemcpyHtoDAsync");
  }
}

void DeviceStorage::scribble(unsigned char value) {
  const Current current(device_);
  // Longer than an upload, so that a writer that waits for the upload only is too early.
  fall_behind(60);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    if (tensor_bytes_[i] == 0) continue;
    cuda::must(driver().cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(places_[i].address), value,
                                        tensor_bytes_[i], stream_),
               "cuMemsetD8Async");
  }
}

void DeviceStorage::settle() const {
  const Current current(device_);
  cuda::must(driver().cuStreamSynchronize(stream_), "cuStreamSynchronize");
}

void DeviceStorage::download() const {
  settle();
  const Current current(device_);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    if (tensor_bytes_[i] == 0) continue;
    cuda::must(
        driver().cuMemcpyDtoH(places_[i].view, reinterpret_cast<CUdeviceptr>(places_[i].address),
                              tensor_bytes_[i]),
        "cuMemcpyDtoH");
  }
}

DeviceStorage::~DeviceStorage() {
  settle();
  {
    const Current current(device_);
    cuda::must(driver().cuMemFreeHost(view_), "cuMemFreeHost");
  }
  places_.clear();
  const std::lock_guard lock(retired_mutex);
  retired().push_back({std::move(allocations_), std::move(fence_), stream_, device_});
}

void DeviceStorage::free_retired() {
  const std::lock_guard lock(retired_mutex);
  for (Retired& one : retired()) {
    one.fence.reset();
    const Current current(one.device);
    cuda::must(driver().cuStreamDestroy(one.stream), "cuStreamDestroy");
  }
  retired().clear();
}

}  // namespace refit::test
