// Virtual memory management: physical memory, reserved addresses, and mappings of one at the other.

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

/// The device that the properties name, or nothing if it cannot give such memory.
std::optional<int> device_of(const CUmemAllocationProp* properties) {
  if (properties == nullptr || properties->type != CU_MEM_ALLOCATION_TYPE_PINNED ||
      properties->location.type != CU_MEM_LOCATION_TYPE_DEVICE)
    return std::nullopt;
  return driver().physical_of(properties->location.id);
}

PhysicalMemory* find_physical(CUmemGenericAllocationHandle handle) {
  const auto found = driver().memories.find(handle);
  const bool usable = found != driver().memories.end() && found->second.references > 0;
  return usable ? &found->second : nullptr;
}

CUmemGenericAllocationHandle add_physical(std::shared_ptr<Backing> backing,
                                          const CUmemAllocationProp& properties,
                                          bool created_here) {
  Driver& driver = fakecuda::driver();
  const std::uint64_t handle = 0x70'0000'0000 + 16 * ++driver.last_physical;
  driver.memories[handle] = {std::move(backing), 1, properties, created_here};
  return handle;
}

/// It goes when nobody names it and nothing maps it.
void drop_if_unused(std::uint64_t handle) {
  Driver& driver = fakecuda::driver();
  const auto found = driver.memories.find(handle);
  if (found == driver.memories.end() || found->second.references > 0) return;
  bool mapped = false;
  driver.ranges.for_each([&](const Range& range) {
    mapped = mapped || (range.kind == RangeKind::vmm && range.handle == handle);
  });
  if (mapped) return;
  const Backing& backing = *found->second.backing;
  if (found->second.created_here) driver.account_back(backing.device(), backing.bytes());
  driver.memories.erase(found);
}

/// Calls visit for every mapping in these addresses if mappings fill them exactly; else false.
template <typename Visit>
bool for_each_whole_mapping(std::uint64_t address, std::uint64_t bytes, Visit&& visit) {
  Driver& driver = fakecuda::driver();
  std::vector<Range*> mappings;
  std::uint64_t at = address;
  while (at < address + bytes) {
    Range* range = driver.ranges.find(at);
    if (range == nullptr || range->kind != RangeKind::vmm || range->base != at) return false;
    mappings.push_back(range);
    at = range->end();
  }
  if (at != address + bytes || mappings.empty()) return false;
  for (Range* range : mappings) visit(*range);
  return true;
}

}  // namespace

CUresult mem_get_allocation_granularity(std::size_t* granularity,
                                        const CUmemAllocationProp* properties,
                                        CUmemAllocationGranularity_flags) {
  const auto device = device_of(properties);
  if (granularity == nullptr || !device) return CUDA_ERROR_INVALID_VALUE;
  if (!driver().device(*device).vmm) return CUDA_ERROR_NOT_SUPPORTED;
  *granularity = driver().device(*device).granularity;
  return CUDA_SUCCESS;
}

CUresult mem_create(CUmemGenericAllocationHandle* handle, std::size_t bytes,
                    const CUmemAllocationProp* properties, unsigned long long flags) {
  Driver& driver = fakecuda::driver();
  const auto device = device_of(properties);
  if (handle == nullptr || bytes == 0 || flags != 0 || !device) return CUDA_ERROR_INVALID_VALUE;
  if (!driver.device(*device).vmm) return CUDA_ERROR_NOT_SUPPORTED;
  const auto types = static_cast<unsigned int>(properties->requestedHandleTypes);
  if ((types & ~static_cast<unsigned int>(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR)) != 0)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (bytes % driver.device(*device).granularity != 0) return CUDA_ERROR_INVALID_VALUE;
  if (!driver.fits(*device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  auto file = SharedFile::create_memfd(Backing::file_bytes(bytes));
  if (!file) return CUDA_ERROR_OUT_OF_MEMORY;
  const ProcessId self = driver.process.id();
  auto backing = Backing::create(std::move(*file), bytes, *device, types, self,
                                 scramble(self.instance ^ ++driver.last_file));
  if (backing == nullptr) return CUDA_ERROR_OUT_OF_MEMORY;
  driver.account(*device, bytes);
  *handle = add_physical(std::move(backing), *properties, /*created_here=*/true);
  return CUDA_SUCCESS;
}

CUresult mem_release(CUmemGenericAllocationHandle handle) {
  PhysicalMemory* memory = find_physical(handle);
  if (memory == nullptr) return CUDA_ERROR_INVALID_VALUE;
  --memory->references;
  drop_if_unused(handle);
  return CUDA_SUCCESS;
}

CUresult mem_address_reserve(CUdeviceptr* pointer, std::size_t bytes, std::size_t alignment,
                             CUdeviceptr wanted, unsigned long long flags) {
  Driver& driver = fakecuda::driver();
  // One granularity for all devices: addresses belong to none of them.
  const std::uint64_t unit = driver.device(driver.configuration.visible.front()).granularity;
  const bool power = (alignment & (alignment - 1)) == 0;
  if (pointer == nullptr || bytes == 0 || bytes % unit != 0 || !power || flags != 0)
    return CUDA_ERROR_INVALID_VALUE;
  static_cast<void>(wanted);  // a hint
  const std::uint64_t base = driver.arena.take(bytes, std::max<std::uint64_t>(alignment, unit));
  if (base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  driver.reservations[base] = {bytes};
  *pointer = base;
  return CUDA_SUCCESS;
}

CUresult mem_address_free(CUdeviceptr pointer, std::size_t bytes) {
  Driver& driver = fakecuda::driver();
  const auto found = driver.reservations.find(pointer);
  if (found == driver.reservations.end() || found->second.bytes != bytes)
    return CUDA_ERROR_INVALID_VALUE;
  if (driver.ranges.overlapping(pointer, bytes) != nullptr)
    return driver.one_of({CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_PERMITTED});
  driver.reservations.erase(found);
  driver.arena.give_back(pointer, bytes, driver.configuration.reuse_addresses);
  return CUDA_SUCCESS;
}

CUresult mem_map(CUdeviceptr pointer, std::size_t bytes, std::size_t offset,
                 CUmemGenericAllocationHandle handle, unsigned long long flags) {
  Driver& driver = fakecuda::driver();
  const PhysicalMemory* memory = find_physical(handle);
  // Hardware may take a part; nobody needs it, and a wrong size is a client's lie.
  if (memory == nullptr || offset != 0 || flags != 0 || bytes != memory->backing->bytes())
    return CUDA_ERROR_INVALID_VALUE;
  auto reservation = driver.reservations.upper_bound(pointer);
  if (reservation == driver.reservations.begin()) return CUDA_ERROR_INVALID_VALUE;
  --reservation;
  const std::uint64_t unit = driver.device(memory->backing->device()).granularity;
  if (pointer + bytes > reservation->first + reservation->second.bytes || pointer % unit != 0 ||
      driver.ranges.overlapping(pointer, bytes) != nullptr)
    return CUDA_ERROR_INVALID_VALUE;
  Range range;
  range.base = pointer;
  range.bytes = bytes;
  range.cpu = driver.arena.cpu(pointer);
  range.kind = RangeKind::vmm;
  range.device = memory->backing->device();
  range.backing = memory->backing;
  range.handle = handle;
  range.reservation = reservation->first;
  if (!range.backing->map_at(range.cpu)) return CUDA_ERROR_OUT_OF_MEMORY;
  driver.ranges.add(std::move(range));
  return CUDA_SUCCESS;
}

CUresult mem_unmap(CUdeviceptr pointer, std::size_t bytes) {
  Driver& driver = fakecuda::driver();
  std::vector<std::pair<std::uint64_t, std::uint64_t>> mappings;
  if (!for_each_whole_mapping(pointer, bytes, [&](const Range& range) {
        mappings.emplace_back(range.base, range.handle);
      }))
    return CUDA_ERROR_INVALID_VALUE;
  if (driver.engine.is_pending(pointer, bytes))
    driver.violation(text("cuMemUnmap of ", Hex{pointer}, " while work on it is pending"));
  driver.arena.unmap(pointer, bytes);
  for (const auto& [base, handle] : mappings) {
    driver.ranges.erase(base);
    drop_if_unused(handle);
  }
  return CUDA_SUCCESS;
}

CUresult mem_set_access(CUdeviceptr pointer, std::size_t bytes, const CUmemAccessDesc* access,
                        std::size_t count) {
  if (access == nullptr || count == 0) return CUDA_ERROR_INVALID_VALUE;
  for (std::size_t i = 0; i < count; ++i) {
    if (access[i].location.type != CU_MEM_LOCATION_TYPE_DEVICE) return CUDA_ERROR_INVALID_VALUE;
    if (!driver().physical_of(access[i].location.id)) return CUDA_ERROR_INVALID_DEVICE;
  }
  const bool whole = for_each_whole_mapping(pointer, bytes, [&](Range& range) {
    for (std::size_t i = 0; i < count; ++i) {
      const int device = *driver().physical_of(access[i].location.id);
      range.access[static_cast<std::size_t>(device)] = static_cast<unsigned char>(access[i].flags);
    }
  });
  return whole ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult mem_get_access(unsigned long long* flags, const CUmemLocation* location,
                        CUdeviceptr pointer) {
  if (flags == nullptr || location == nullptr || location->type != CU_MEM_LOCATION_TYPE_DEVICE)
    return CUDA_ERROR_INVALID_VALUE;
  const auto device = driver().physical_of(location->id);
  const Range* range = driver().ranges.find(pointer);
  if (!device || range == nullptr || range->kind != RangeKind::vmm) return CUDA_ERROR_INVALID_VALUE;
  *flags = range->access[static_cast<std::size_t>(*device)];
  return CUDA_SUCCESS;
}

CUresult mem_export(void* shareable, CUmemGenericAllocationHandle handle,
                    CUmemAllocationHandleType type, unsigned long long flags) {
  const PhysicalMemory* memory = find_physical(handle);
  if (shareable == nullptr || memory == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  if ((memory->backing->page().handle_types & static_cast<unsigned int>(type)) == 0)
    return driver().one_of({CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_PERMITTED});
  // Nothing promises that it is closed on exec; who wants that must say so.
  const int fd = ::fcntl(memory->backing->fd(), F_DUPFD, 0);
  if (fd < 0) return CUDA_ERROR_OPERATING_SYSTEM;
  *static_cast<int*>(shareable) = fd;
  return CUDA_SUCCESS;
}

CUresult mem_import(CUmemGenericAllocationHandle* handle, void* shareable,
                    CUmemAllocationHandleType type) {
  Driver& driver = fakecuda::driver();
  if (handle == nullptr) return CUDA_ERROR_INVALID_VALUE;
  if (type != CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) return CUDA_ERROR_NOT_SUPPORTED;
  const auto fd = static_cast<int>(reinterpret_cast<std::intptr_t>(shareable));
  // The caller keeps its fd, and is expected to close it.
  auto file = SharedFile::adopt(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  auto backing = file ? Backing::adopt(std::move(*file)) : nullptr;
  if (backing == nullptr)
    return driver.one_of(
        {CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_INVALID_HANDLE, CUDA_ERROR_NOT_SUPPORTED});
  const auto device = static_cast<std::size_t>(backing->device());
  if (device >= driver.configuration.devices.size() || driver.configuration.absent[device])
    return CUDA_ERROR_INVALID_DEVICE;
  CUmemAllocationProp properties{};
  properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
  properties.requestedHandleTypes =
      static_cast<CUmemAllocationHandleType>(backing->page().handle_types);
  properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, driver.ordinal_of(backing->device())};
  *handle = add_physical(std::move(backing), properties, /*created_here=*/false);
  return CUDA_SUCCESS;
}

CUresult mem_get_properties(CUmemAllocationProp* properties, CUmemGenericAllocationHandle handle) {
  const PhysicalMemory* memory = find_physical(handle);
  if (properties == nullptr || memory == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *properties = memory->properties;
  return CUDA_SUCCESS;
}

CUresult mem_retain(CUmemGenericAllocationHandle* handle, void* address) {
  Driver& driver = fakecuda::driver();
  const Range* range = driver.ranges.find(reinterpret_cast<std::uint64_t>(address));
  if (handle == nullptr || range == nullptr || range->kind != RangeKind::vmm)
    return CUDA_ERROR_INVALID_VALUE;
  ++driver.memories.find(range->handle)->second.references;
  *handle = range->handle;
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
