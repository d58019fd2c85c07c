// The driver's calls of the bench's own processes. See cuda.hpp.
//
// One thread. What the driver answers while something is given back is not looked at: the process
// is about to end, or has failed before.
#include "cuda.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <utility>

#include "model.hpp"

namespace refit::bench {
namespace {

#define REFIT_STRING_OF(name) #name
#define REFIT_EXPORTED_NAME(name) REFIT_STRING_OF(name)

constexpr CUmemAllocationHandleType kFd = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
/// An allocation that shares no such block with another one is what its handle opens.
constexpr std::uint64_t kBlockBytes = std::uint64_t{2} << 20;

CUmemAllocationProp vmm_properties() {
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = 0;
  properties.requestedHandleTypes = kFd;
  return properties;
}

}  // namespace

Result<void> check(CUresult code, const char* call) {
  if (code == CUDA_SUCCESS) return {};
  return Unexpected(Error{Errc::cuda,
                          static_cast<int>(code),
                          "in the bench, " + std::string(call) + ": CUDA error " +
                              std::to_string(static_cast<int>(code)),
                          {}});
}

Result<std::shared_ptr<Cuda>> Cuda::open() {
  auto made = std::shared_ptr<Cuda>(new Cuda);
  REFIT_TRY(made->load());
  Cuda& cuda = *made;
  REFIT_BENCH_TRY_CUDA(cuda, cuInit, 0);
  REFIT_BENCH_TRY_CUDA(cuda, cuDeviceGet, &cuda.device_, 0);
  REFIT_BENCH_TRY_CUDA(cuda, cuDevicePrimaryCtxRetain, &cuda.context_, cuda.device_);
  REFIT_BENCH_TRY_CUDA(cuda, cuCtxSetCurrent, cuda.context_);
  REFIT_BENCH_TRY_CUDA(cuda, cuStreamCreate, &cuda.stream_, CU_STREAM_NON_BLOCKING);
  return made;
}

Result<void> Cuda::load() {
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return fail(Errc::unsupported, std::string("no driver: ") + ::dlerror());
#define REFIT_X(name)                                                                   \
  name = reinterpret_cast<decltype(name)>(::dlsym(library, REFIT_EXPORTED_NAME(name))); \
  if (name == nullptr) return fail(Errc::unsupported, "the driver has no " #name);
  REFIT_BENCH_CUDA(REFIT_X)
#undef REFIT_X
  return {};
}

Cuda::~Cuda() {
  if (stream_ != nullptr) cuStreamDestroy(stream_);
  if (context_ == nullptr) return;
  cuCtxSetCurrent(nullptr);
  cuDevicePrimaryCtxRelease(device_);
}

Result<DeviceBuffer> DeviceBuffer::allocate(std::shared_ptr<Cuda> given, Sharing sharing,
                                            std::uint64_t bytes) {
  DeviceBuffer made;
  made.cuda_ = std::move(given);
  made.sharing_ = sharing;
  Cuda& cuda = *made.cuda_;
  if (sharing == Sharing::legacy) {
    made.bytes_ = rounded_to(bytes, kBlockBytes);
    REFIT_BENCH_TRY_CUDA(cuda, cuMemAlloc, &made.address_, made.bytes_);
    return made;
  }
  const CUmemAllocationProp properties = vmm_properties();
  std::size_t granularity = 0;
  REFIT_BENCH_TRY_CUDA(cuda, cuMemGetAllocationGranularity, &granularity, &properties,
                       CU_MEM_ALLOC_GRANULARITY_MINIMUM);
  made.bytes_ = rounded_to(bytes, granularity);
  REFIT_BENCH_TRY_CUDA(cuda, cuMemCreate, &made.handle_, made.bytes_, &properties, 0);
  REFIT_TRY(made.map());
  return made;
}

Result<DeviceBuffer> DeviceBuffer::open(std::shared_ptr<Cuda> given, const nlohmann::json& how,
                                        UniqueFd fd) {
  DeviceBuffer made;
  made.cuda_ = std::move(given);
  made.opened_ = true;
  made.bytes_ = how.at("bytes").get<std::uint64_t>();
  Cuda& cuda = *made.cuda_;
  if (!how.contains("legacy")) {
    made.sharing_ = Sharing::vmm;
    // NOLINTNEXTLINE(performance-no-int-to-ptr): the API takes an fd as a pointer
    void* const as_pointer = reinterpret_cast<void*>(static_cast<std::uintptr_t>(fd.get()));
    REFIT_BENCH_TRY_CUDA(cuda, cuMemImportFromShareableHandle, &made.handle_, as_pointer, kFd);
    REFIT_TRY(made.map());
    return made;
  }
  CUipcMemHandle handle{};
  const auto bytes = how.at("legacy").get<std::array<char, sizeof handle.reserved>>();
  std::copy(bytes.begin(), bytes.end(), handle.reserved);
  REFIT_BENCH_TRY_CUDA(cuda, cuIpcOpenMemHandle, &made.address_, handle,
                       CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  return made;
}

Result<void> DeviceBuffer::map() {
  Cuda& cuda = *cuda_;
  REFIT_BENCH_TRY_CUDA(cuda, cuMemAddressReserve, &address_, bytes_, 0, 0, 0);
  REFIT_BENCH_TRY_CUDA(cuda, cuMemMap, address_, bytes_, 0, handle_, 0);
  mapped_ = true;
  const CUmemAccessDesc access{vmm_properties().location, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
  REFIT_BENCH_TRY_CUDA(cuda, cuMemSetAccess, address_, bytes_, &access, 1);
  return {};
}

Result<std::pair<nlohmann::json, UniqueFd>> DeviceBuffer::share() const {
  Cuda& cuda = *cuda_;
  nlohmann::json how{{"bytes", bytes_}};
  if (sharing_ == Sharing::legacy) {
    CUipcMemHandle handle{};
    REFIT_BENCH_TRY_CUDA(cuda, cuIpcGetMemHandle, &handle, address_);
    how["legacy"] = std::to_array(handle.reserved);
    return std::pair(std::move(how), UniqueFd());
  }
  int fd = -1;
  REFIT_BENCH_TRY_CUDA(cuda, cuMemExportToShareableHandle, &fd, handle_, kFd, 0);
  return std::pair(std::move(how), UniqueFd::adopt(fd));
}

DeviceBuffer::~DeviceBuffer() {
  if (sharing_ == Sharing::vmm) {
    if (mapped_) cuda_->cuMemUnmap(address_, bytes_);
    if (address_ != 0) cuda_->cuMemAddressFree(address_, bytes_);
    if (handle_ != 0) cuda_->cuMemRelease(handle_);
  } else if (address_ != 0) {
    opened_ ? cuda_->cuIpcCloseMemHandle(address_) : cuda_->cuMemFree(address_);
  }
}

void DeviceBuffer::swap(DeviceBuffer& other) noexcept {
  std::swap(cuda_, other.cuda_);
  std::swap(sharing_, other.sharing_);
  std::swap(opened_, other.opened_);
  std::swap(address_, other.address_);
  std::swap(bytes_, other.bytes_);
  std::swap(handle_, other.handle_);
  std::swap(mapped_, other.mapped_);
}

Result<PinnedRange> PinnedRange::make(std::shared_ptr<Cuda> given, std::byte* data,
                                      std::uint64_t bytes) {
  Cuda& cuda = *given;
  REFIT_BENCH_TRY_CUDA(cuda, cuMemHostRegister, data, bytes, CU_MEMHOSTREGISTER_PORTABLE);
  return PinnedRange(std::move(given), data);
}

PinnedRange::~PinnedRange() {
  if (data_ != nullptr) cuda_->cuMemHostUnregister(data_);
}

}  // namespace refit::bench
