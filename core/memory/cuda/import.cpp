#include "memory/cuda/import.hpp"

#include <unistd.h>

#include <cstring>

#include "memory/cuda/export.hpp"

namespace refit::cuda {
namespace {

std::string count(std::uint64_t bytes) { return std::to_string(bytes) + " bytes"; }

Unexpected bad(const std::string& label, const std::string& problem) {
  return fail(Errc::bad_region, label + ": " + problem);
}

/// An error of a call that was made with what a peer wrote. Which of several codes the driver
/// returns for such is not documented.
Unexpected refused(const Driver& driver, const std::string& what, CUresult code) {
  Unexpected error = fail_cuda(driver, what, code);
  switch (code) {
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE:
    case CUDA_ERROR_INVALID_CONTEXT:
    case CUDA_ERROR_INVALID_DEVICE:
    case CUDA_ERROR_MAP_FAILED:
    case CUDA_ERROR_NOT_PERMITTED:
    case CUDA_ERROR_NOT_SUPPORTED:
      error.value().code = Errc::bad_region;
      error.value().native = 0;
      return error;
    default:
      return error;
  }
}

std::string why_not_opened(CUresult code) {
  switch (code) {
    case CUDA_ERROR_ALREADY_MAPPED:
      return "; this process has it open in another way, or its last use is just ending: register "
             "it again";
    case CUDA_ERROR_INVALID_CONTEXT:
      return "; a handle of this very process cannot be opened in it: export for the same process";
    case CUDA_ERROR_INVALID_DEVICE:
      return "; its device has no device node here (/dev/nvidia*)";
    case CUDA_ERROR_TOO_MANY_PEERS:
      return "; the device has access to as many others as it can";
    case CUDA_ERROR_INVALID_VALUE:
    case CUDA_ERROR_INVALID_HANDLE:
    case CUDA_ERROR_MAP_FAILED:
    case CUDA_ERROR_NOT_PERMITTED:
    case CUDA_ERROR_NOT_SUPPORTED:
      return "; it is no handle, its process ended or freed the memory, or the driver keeps it "
             "from this process (another user, another pid namespace)";
    default:
      return "";
  }
}

/// The bytes of all pieces, or what is wrong with them and the region in them.
Result<std::uint64_t> check_layout(const Exported& exported, const Device& device,
                                   const std::string& label) {
  const std::size_t pieces = exported.pieces.size();
  if (pieces == 0) return bad(label, "it names no allocation");
  if (exported.kind == RegionKind::cuda_legacy && pieces != 1)
    return bad(label, "it names " + std::to_string(pieces) + " allocations, but is of one");
  if (exported.bytes == 0) return bad(label, "0 bytes are no region");
  std::uint64_t total = 0;
  for (const DevicePiece& piece : exported.pieces) {
    if (piece.bytes == 0) return bad(label, "it names an allocation of 0 bytes");
    // Also bounds the sum, whatever a client declares: no addresses are reserved for more.
    if (piece.bytes > device.memory_bytes - total)
      return bad(label, "its allocations have more bytes than device " + device.label() + ", " +
                            std::to_string(device.memory_bytes));
    total += piece.bytes;
  }
  if (exported.offset >= exported.pieces.front().bytes)
    return bad(label, "it begins " + count(exported.offset) + " into an allocation of " +
                          count(exported.pieces.front().bytes));
  if (exported.bytes > total - exported.offset)
    return bad(label, count(exported.bytes) + " from " + std::to_string(exported.offset) +
                          " on leave its allocation of " + count(total));
  return total;
}

/// Reserved addresses and what is mapped there, given back together.
class Reservation {
 public:
  explicit Reservation(std::shared_ptr<const Context> context) : context_(std::move(context)) {}
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;
  ~Reservation() {
    const Driver& driver = context_->driver();
    if (mapped_bytes_ != 0) static_cast<void>(driver.mem_unmap(base_, mapped_bytes_));
    if (base_ != 0) static_cast<void>(driver.mem_address_free(base_, bytes_));
  }

  Result<void> reserve(std::uint64_t bytes, const std::string& label) {
    REFIT_TRY_CUDA(context_->driver(), mem_address_reserve(&base_, bytes, 0, 0, 0),
                   label + ": addresses for " + count(bytes) + " (cuMemAddressReserve)");
    bytes_ = bytes;
    return {};
  }
  /// Behind what is mapped already.
  Result<void> map(const DevicePiece& piece, const std::string& label);
  Result<void> grant(Access access, const std::string& label);
  [[nodiscard]] CUdeviceptr base() const { return base_; }

 private:
  std::shared_ptr<const Context> context_;
  CUdeviceptr base_ = 0;
  std::uint64_t bytes_ = 0;
  std::uint64_t mapped_bytes_ = 0;
};

Result<void> Reservation::map(const DevicePiece& piece, const std::string& label) {
  const Driver& driver = context_->driver();
  if (!piece.fd) return bad(label, "no fd came with it");
  CUmemGenericAllocationHandle handle = 0;
  const auto number = static_cast<std::uintptr_t>(piece.fd.get());
  void* const fd = reinterpret_cast<void*>(number);  // NOLINT(performance-no-int-to-ptr): the API's
  CUresult code = driver.mem_import_from_shareable_handle(&handle, fd,
                                                          CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  if (code != CUDA_SUCCESS)
    return refused(driver,
                   label + ": importing its fd (cuMemImportFromShareableHandle)" +
                       (code == CUDA_ERROR_INVALID_DEVICE ? why_not_opened(code) : ""),
                   code);
  CUmemAllocationProp properties{};
  code = driver.mem_get_allocation_properties(&properties, handle);
  const bool is_of_device = code == CUDA_SUCCESS &&
                            properties.location.type == CU_MEM_LOCATION_TYPE_DEVICE &&
                            properties.location.id == context_->device().ordinal;
  if (is_of_device) code = driver.mem_map(base_ + mapped_bytes_, piece.bytes, 0, handle, 0);
  // The mapping keeps the memory.
  static_cast<void>(driver.mem_release(handle));
  if (code == CUDA_SUCCESS && !is_of_device)
    return bad(label, "its fd is of memory on another device than " + context_->device().label());
  if (code != CUDA_SUCCESS)
    return refused(
        driver,
        label + ": mapping " + count(piece.bytes) + " (cuMemMap), which its fd may not have", code);
  mapped_bytes_ += piece.bytes;
  return {};
}

Result<void> Reservation::grant(Access access, const std::string& label) {
  // Also for the devices that a copy may go to or come from.
  std::vector<CUmemAccessDesc> grants(1 + context_->device().peers.size());
  for (std::size_t i = 0; i < grants.size(); ++i) {
    grants[i].location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    grants[i].location.id = i == 0 ? context_->device().ordinal : context_->device().peers[i - 1];
    grants[i].flags = access == Access::read_only ? CU_MEM_ACCESS_FLAGS_PROT_READ
                                                  : CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
  }
  REFIT_TRY_CUDA(context_->driver(),
                 mem_set_access(base_, mapped_bytes_, grants.data(), grants.size()),
                 label + ": access to it (cuMemSetAccess)");
  return {};
}

Result<void> open_vmm(const Exported& exported, std::uint64_t total, const std::string& label,
                      DeviceMemory& memory) {
  const Device& device = memory.context->device();
  const Driver& driver = memory.context->driver();
  if (!device.vmm || !device.posix_fd_handles)
    return fail(Errc::unsupported, label + ": device " + device.label() + " maps no memory by fd");
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
  properties.location.id = device.ordinal;
  properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
  std::size_t granularity = 1;
  REFIT_TRY_CUDA(
      driver,
      mem_get_allocation_granularity(&granularity, &properties, CU_MEM_ALLOC_GRANULARITY_MINIMUM),
      label + ": the granularity of device " + device.label() + " (cuMemGetAllocationGranularity)");
  for (const DevicePiece& piece : exported.pieces) {
    if (piece.bytes % granularity != 0)
      return bad(label, "it names a segment of " + count(piece.bytes) +
                            ", which is no multiple of " + std::to_string(granularity));
  }
  const auto reservation = std::make_shared<Reservation>(memory.context);
  REFIT_TRY(reservation->reserve(total, label));
  for (const DevicePiece& piece : exported.pieces) REFIT_TRY(reservation->map(piece, label));
  REFIT_TRY(reservation->grant(memory.access, label));
  memory.address = reservation->base() + exported.offset;
  memory.mapping = reservation;
  return {};
}

}  // namespace

/// An opened legacy handle.
struct Importer::Allocation {
  std::shared_ptr<const Context> context;
  CUdeviceptr base = 0;
  std::uint64_t bytes = 0;  ///< from base on, as the driver says here

  Allocation() = default;
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  ~Allocation() {
    if (base == 0) return;
    // A context that cannot be entered any more took its mappings with it.
    const auto current = Current::enter(*context);
    if (current) static_cast<void>(context->driver().ipc_close_mem_handle(base));
  }
};

Result<std::shared_ptr<const DeviceMemory>> Importer::open(const Exporter& exporter,
                                                           const Exported& exported, Access access,
                                                           const std::string& label) {
  const Device* device = devices_->find(exported.device);
  if (device == nullptr) {
    std::string seen;
    for (const Device& each : devices_->all())
      seen += (seen.empty() ? "" : ", ") + each.uuid.text();
    return bad(label, "it is on device " + exported.device.text() +
                          ", which this process does not see (" + seen +
                          "): look at its CUDA_VISIBLE_DEVICES and, in a container or a sandboxed "
                          "unit, at /dev/nvidia*");
  }
  REFIT_TRY_ASSIGN(const std::uint64_t total, check_layout(exported, *device, label));
  auto memory = std::make_shared<DeviceMemory>();
  REFIT_TRY_ASSIGN(memory->context, devices_->context(*device));
  memory->bytes = exported.bytes;
  memory->kind = exported.kind;
  memory->allocation_id = exported.pieces.front().allocation_id;
  memory->access = access;
  switch (exported.kind) {
    case RegionKind::cuda_legacy:
      REFIT_TRY(open_legacy(exporter, exported, label, *memory));
      return memory;
    case RegionKind::cuda_vmm:
      REFIT_TRY(open_vmm(exported, total, label, *memory));
      return memory;
    case RegionKind::cuda_local:
      REFIT_TRY(open_local(exporter, exported, label, *memory));
      return memory;
    case RegionKind::host:
      break;
  }
  return bad(label, "region kind " + std::to_string(static_cast<unsigned int>(exported.kind)) +
                        " is no device memory");
}

Result<void> Importer::open_legacy(const Exporter& exporter, const Exported& exported,
                                   const std::string& label, DeviceMemory& memory) {
  if (exporter.uid != ::geteuid() && !legacy_across_uids_) {
    return fail(Errc::permission,
                label + ": a CUDA IPC handle of uid " + std::to_string(exporter.uid) +
                    " is not taken by a daemon of uid " + std::to_string(::geteuid()) +
                    ": whoever knows the handle has the memory, and it cannot be revoked. Run the "
                    "daemon as that user, use memory that is shared by fd "
                    "(PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True), or set "
                    "cuda.legacy_across_uids");
  }
  REFIT_TRY_ASSIGN(const Current current, Current::enter(*memory.context));
  const DevicePiece& piece = exported.pieces.front();
  REFIT_TRY_ASSIGN(const auto allocation, allocation_of({exporter.session, piece.allocation_id},
                                                        memory.context, piece.handle, label));
  // The declared size was checked before; only this one is true.
  if (exported.offset > allocation->bytes || exported.bytes > allocation->bytes - exported.offset)
    return bad(label, count(exported.bytes) + " from " + std::to_string(exported.offset) +
                          " on leave its allocation, which has " + count(allocation->bytes));
  memory.address = allocation->base + exported.offset;
  memory.mapping = allocation;
  return {};
}

Result<std::shared_ptr<const Importer::Allocation>> Importer::allocation_of(
    const Key& key, const std::shared_ptr<const Context>& context, const IpcHandle& handle,
    const std::string& label) {
  const Driver& driver = context->driver();
  const std::lock_guard lock(mutex_);
  std::erase_if(allocations_, [](const auto& entry) { return entry.second.expired(); });
  if (const auto found = allocations_.find(key); found != allocations_.end()) {
    auto held = found->second.lock();
    if (held != nullptr && held->context == context) return held;
    if (held != nullptr)
      return bad(label, "it names allocation " + std::to_string(key.second) +
                            " on another device than before");
  }
  auto allocation = std::make_shared<Allocation>();
  allocation->context = context;
  CUipcMemHandle bytes{};
  std::memcpy(bytes.reserved, handle.data(), handle.size());
  CUresult code =
      driver.ipc_open_mem_handle(&allocation->base, bytes, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
  if (code != CUDA_SUCCESS) {
    allocation->base = 0;
    return refused(
        driver, label + ": opening its CUDA IPC handle (cuIpcOpenMemHandle)" + why_not_opened(code),
        code);
  }
  CUdeviceptr base = 0;
  std::size_t size = 0;
  REFIT_TRY_CUDA(driver, mem_get_address_range(&base, &size, allocation->base),
                 label + ": the allocation that was opened (cuMemGetAddressRange)");
  int ordinal = CU_DEVICE_INVALID;
  REFIT_TRY_CUDA(
      driver,
      pointer_get_attribute(&ordinal, CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, allocation->base),
      label + ": the device of what was opened (cuPointerGetAttribute)");
  if (ordinal != context->device().ordinal)
    return bad(label,
               "its handle is of memory on another device than " + context->device().label());
  // A small cudaMalloc is a part of a larger block, and the block is what is shared.
  allocation->bytes = base + size - allocation->base;
  allocations_[key] = allocation;
  return allocation;
}

Result<void> Importer::open_local(const Exporter& exporter, const Exported& exported,
                                  const std::string& label, DeviceMemory& memory) {
  if (exporter.pid != ::getpid())
    return bad(label, "an address is only taken from this very process; pid " +
                          std::to_string(exporter.pid) + " must export a handle");
  REFIT_TRY_ASSIGN(const Located located,
                   locate(*devices_, exported.address, exported.bytes, label));
  if (located.device->uuid != exported.device)
    return bad(label, "its address is on device " + located.device->label());
  if (located.segments.front().allocation_id != memory.allocation_id)
    return bad(label, "its memory was freed since it was exported");
  memory.address = exported.address;
  return {};
}

std::size_t Importer::open_allocations() {
  const std::lock_guard lock(mutex_);
  std::erase_if(allocations_, [](const auto& entry) { return entry.second.expired(); });
  return allocations_.size();
}

}  // namespace refit::cuda
