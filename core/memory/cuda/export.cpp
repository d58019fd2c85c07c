#include "memory/cuda/export.hpp"

#include <fcntl.h>

#include <cstdio>
#include <cstring>

namespace refit::cuda {
namespace {

std::string hex(CUdeviceptr pointer) {
  char text[2 + 16 + 1];
  std::snprintf(text, sizeof text, "0x%llx", pointer);
  return text;
}

/// What the driver says of a pointer; `otherwise` for an attribute that it does not know, or that
/// this pointer does not have. Some are booleans of one byte, hence the cleared Value.
template <typename Value>
Value ask(const Driver& driver, CUpointer_attribute attribute, CUdeviceptr pointer,
          Value otherwise) {
  Value value{};
  const CUresult code = driver.pointer_get_attribute(&value, attribute, pointer);
  return code == CUDA_SUCCESS ? value : otherwise;
}

bool is_of_pool(const Driver& driver, CUdeviceptr pointer) {
  return ask<CUmemoryPool>(driver, CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, pointer, nullptr) !=
         nullptr;
}

Unexpected not_cuda_memory(CUdeviceptr pointer, const std::string& label) {
  return fail(Errc::bad_region,
              label + ": " + hex(pointer) +
                  " is no CUDA memory: it is pageable host memory, or was freed. Device memory "
                  "comes from cudaMalloc or torch; host memory from refit::SharedMemory");
}

/// An owned reference to the physical memory behind a mapping; none where there is no cuMemCreate's
/// memory.
class PhysicalHandle {
 public:
  PhysicalHandle(const Driver& driver, CUdeviceptr mapped) : driver_(driver) {
    void* const address =
        reinterpret_cast<void*>(mapped);  // NOLINT(performance-no-int-to-ptr): API
    if (driver.mem_retain_allocation_handle(&handle_, address) != CUDA_SUCCESS) handle_ = 0;
  }
  ~PhysicalHandle() {
    if (handle_ != 0) static_cast<void>(driver_.mem_release(handle_));
  }
  PhysicalHandle(const PhysicalHandle&) = delete;
  PhysicalHandle& operator=(const PhysicalHandle&) = delete;
  [[nodiscard]] explicit operator bool() const { return handle_ != 0; }
  [[nodiscard]] CUmemGenericAllocationHandle get() const { return handle_; }

 private:
  const Driver& driver_;
  CUmemGenericAllocationHandle handle_ = 0;
};

Result<UniqueFd> export_segment(const Driver& driver, const Located::Segment& segment,
                                const std::string& label) {
  const PhysicalHandle physical(driver, segment.base);
  if (!physical) return not_cuda_memory(segment.base, label);
  CUmemAllocationProp properties{};
  REFIT_TRY_CUDA(driver, mem_get_allocation_properties(&properties, physical.get()),
                 label + ": its properties (cuMemGetAllocationPropertiesFromHandle)");
  constexpr auto kFd = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  if ((properties.requestedHandleTypes & kFd) == 0) {
    return fail(Errc::bad_region,
                label +
                    ": its segments were made by cuMemCreate without "
                    "CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, and cannot be shared. PyTorch 2.5 "
                    "or newer: start with TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1 in the environment; "
                    "else with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False. Another "
                    "allocator: let it request that handle type");
  }
  int fd = -1;
  REFIT_TRY_CUDA(driver, mem_export_to_shareable_handle(&fd, physical.get(), kFd, 0),
                 label + ": exporting a segment (cuMemExportToShareableHandle)");
  UniqueFd owned = UniqueFd::adopt(fd);
  // A child that holds it would hold the device's memory.
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
    return fail_os(label + ": closing its fd on exec (fcntl)", errno);
  return owned;
}

}  // namespace

Result<std::uint64_t> identify(const Driver& driver, CUdeviceptr pointer,
                               const std::string& label) {
  unsigned long long id = 0;
  const CUresult code = driver.pointer_get_attribute(&id, CU_POINTER_ATTRIBUTE_BUFFER_ID, pointer);
  if (code == CUDA_ERROR_INVALID_VALUE) return not_cuda_memory(pointer, label);
  if (code != CUDA_SUCCESS)
    return fail_cuda(driver, label + ": which allocation it is (cuPointerGetAttribute)", code);
  return id;
}

Result<Located> locate(VisibleDevices& devices, CUdeviceptr pointer, std::uint64_t bytes,
                       const std::string& label) {
  if (bytes == 0) return fail(Errc::bad_argument, label + ": 0 bytes are no range");
  if (pointer + bytes < pointer)
    return fail(Errc::bad_argument, label + ": " + hex(pointer) + " and " + std::to_string(bytes) +
                                        " bytes pass the end of the addresses");
  const Driver& driver = devices.driver();
  unsigned int type = 0;
  const CUresult code =
      driver.pointer_get_attribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, pointer);
  if (code == CUDA_ERROR_INVALID_VALUE) return not_cuda_memory(pointer, label);
  if (code != CUDA_SUCCESS)
    return fail_cuda(driver, label + ": what it is (cuPointerGetAttribute)", code);
  if (ask(driver, CU_POINTER_ATTRIBUTE_IS_MANAGED, pointer, 0U) != 0) {
    return fail(Errc::bad_region,
                label +
                    ": it is managed memory (cudaMallocManaged), which no other process can reach. "
                    "Allocate it with cudaMalloc; rmm: CudaMemoryResource in place of "
                    "ManagedMemoryResource");
  }
  if (type != CU_MEMORYTYPE_DEVICE) {
    return fail(Errc::bad_region,
                label +
                    ": it is pinned host memory, not device memory, and pinned memory of "
                    "cudaHostAlloc cannot be shared. Take refit::SharedMemory and register that "
                    "with CUDA (cudaHostRegister)");
  }
  Located located;
  const int ordinal = ask(driver, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, pointer, CU_DEVICE_INVALID);
  located.device = devices.find(static_cast<CUdevice>(ordinal));
  if (located.device == nullptr)
    return fail(Errc::bad_region, label + ": it is on no device that this process sees");

  // Everything below asks in the context of the memory's device; of memory made in another context
  // than the primary one the driver may refuse that.
  REFIT_TRY_ASSIGN(const auto context, devices.context(*located.device));
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
  const bool is_legacy =
      ask(driver, CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, pointer, 0U) != 0;
  const bool is_vmm = !is_legacy && !is_of_pool(driver, pointer) && PhysicalHandle(driver, pointer);
  if (is_legacy) located.kind = RegionKind::cuda_legacy;
  if (is_vmm) located.kind = RegionKind::cuda_vmm;

  const CUdeviceptr end = pointer + bytes;
  for (CUdeviceptr at = pointer; at < end;) {
    Located::Segment segment;
    std::size_t segment_bytes = 0;
    // Of a range of several segments the driver tells the one that holds the pointer.
    const CUresult found = driver.mem_get_address_range(&segment.base, &segment_bytes, at);
    if (found != CUDA_SUCCESS && found != CUDA_ERROR_NOT_FOUND && found != CUDA_ERROR_INVALID_VALUE)
      return fail_cuda(driver, label + ": its allocation (cuMemGetAddressRange)", found);
    const bool goes_on = at == pointer || (is_vmm && PhysicalHandle(driver, at) &&
                                           ask(driver, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, at,
                                               CU_DEVICE_INVALID) == ordinal);
    if (found != CUDA_SUCCESS || !goes_on) {
      return fail(Errc::bad_region, label + ": of " + std::to_string(bytes) + " bytes from " +
                                        hex(pointer) + " on only " + std::to_string(at - pointer) +
                                        " lie in its allocation");
    }
    segment.bytes = segment_bytes;
    REFIT_TRY_ASSIGN(segment.allocation_id, identify(driver, segment.base, label));
    located.segments.push_back(segment);
    at = segment.base + segment.bytes;
  }
  return located;
}

Result<Exported> export_memory(VisibleDevices& devices, CUdeviceptr pointer, std::uint64_t bytes,
                               const std::string& label, bool same_process) {
  REFIT_TRY_ASSIGN(const Located located, locate(devices, pointer, bytes, label));
  const Driver& driver = devices.driver();
  Exported exported;
  exported.device = located.device->uuid;
  exported.kind = same_process ? RegionKind::cuda_local : located.kind;
  exported.bytes = bytes;
  exported.offset = pointer - located.segments.front().base;
  for (const Located::Segment& segment : located.segments) {
    DevicePiece& piece = exported.pieces.emplace_back();
    piece.bytes = segment.bytes;
    piece.allocation_id = segment.allocation_id;
  }
  if (same_process) {
    exported.address = pointer;
    return exported;
  }
  switch (located.kind) {
    case RegionKind::cuda_legacy: {
      REFIT_TRY_ASSIGN(const auto context, devices.context(*located.device));
      REFIT_TRY_ASSIGN(const Current current, Current::enter(*context));
      CUipcMemHandle handle{};
      REFIT_TRY_CUDA(driver, ipc_get_mem_handle(&handle, located.segments.front().base),
                     label + ": exporting it (cuIpcGetMemHandle)");
      std::memcpy(exported.pieces.front().handle.data(), handle.reserved, sizeof handle.reserved);
      return exported;
    }
    case RegionKind::cuda_vmm:
      for (std::size_t i = 0; i < located.segments.size(); ++i) {
        REFIT_TRY_ASSIGN(exported.pieces[i].fd, export_segment(driver, located.segments[i], label));
      }
      return exported;
    case RegionKind::cuda_local:
    case RegionKind::host:
      break;
  }
  return fail(
      Errc::bad_region,
      label +
          (is_of_pool(driver, pointer)
               ? ": it comes from a memory pool (cudaMallocAsync), which refit does not "
                 "share. PyTorch: PYTORCH_CUDA_ALLOC_CONF=backend:native; rmm: "
                 "CudaMemoryResource in place of CudaAsyncMemoryResource; else cudaMalloc"
               : ": the driver lets no other process reach it: device " + located.device->label() +
                     " has no CUDA IPC, or the memory was imported from a third "
                     "process. Allocate it here with cudaMalloc"));
}

}  // namespace refit::cuda
