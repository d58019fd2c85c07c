// cuMemAlloc and its kin, and what a pointer is.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

constexpr std::uint64_t kLarge = std::uint64_t{2} << 20;
constexpr std::uint64_t kSmallAlignment = std::uint64_t{64} << 10;

/// What a handle of the default pool of a device looks like.
CUmemoryPool default_pool(int physical) {
  return reinterpret_cast<CUmemoryPool>(0xb0'0000'0000 +
                                        16 * (static_cast<std::uint64_t>(physical) + 1));
}

CUresult allocate(CUdeviceptr* pointer, std::size_t bytes, RangeKind kind) {
  Driver& driver = fakecuda::driver();
  Context* context = Driver::current();
  if (pointer == nullptr || bytes == 0) return CUDA_ERROR_INVALID_VALUE;
  if (!driver.fits(context->device, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t number = ++driver.last_file;
  auto file = kind == RangeKind::allocation
                  ? SharedFile::create(driver.file_path("m-", driver.process.id(), number),
                                       Backing::file_bytes(bytes))
                  : SharedFile::create_memfd(Backing::file_bytes(bytes));
  const std::uint64_t alignment = bytes >= kLarge ? kLarge : kSmallAlignment;
  const std::uint64_t base = file ? driver.arena.take(bytes, alignment) : 0;
  if (base == 0) return CUDA_ERROR_OUT_OF_MEMORY;
  const std::uint64_t nonce = scramble(driver.process.id().instance + number);
  Range range;
  range.backing = Backing::create(std::move(*file), bytes, context->device, CU_MEM_HANDLE_TYPE_NONE,
                                  driver.process.id(), nonce);
  range.base = base;
  range.bytes = bytes;
  range.cpu = driver.arena.cpu(base);
  range.kind = kind;
  range.device = context->device;
  range.context = context;
  range.file = number;
  if (range.backing == nullptr || !range.backing->map_at(range.cpu)) {
    ::unlink(driver.file_path("m-", driver.process.id(), number).c_str());
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  driver.ranges.add(std::move(range));
  driver.account(context->device, bytes);
  *pointer = base;
  return CUDA_SUCCESS;
}

/// Says who would lose the bytes of this allocation.
void complain_of_importers(const MemoryPage& page, std::uint64_t base) {
  Driver& driver = fakecuda::driver();
  for (const MemoryPage::Importer& importer : page.importers) {
    const ProcessId id{importer.pid.load(), importer.instance.load()};
    if (id.pid != 0 && driver.process.is_alive(id))
      driver.violation(text("cuMemFree of ", Hex{base}, " while pid ", id.pid, " has it open"));
  }
}

}  // namespace

bool Driver::fits(int physical, std::uint64_t bytes) const {
  const std::uint64_t used = process.page().device_bytes[static_cast<std::size_t>(physical)].load();
  const std::uint64_t total = device(physical).memory_bytes;
  return bytes <= total && used + bytes <= total;
}

std::string Driver::file_path(const char* prefix, ProcessId owner, std::uint64_t number) const {
  return text(configuration.directory, '/', prefix, owner.pid, '-', Hex{owner.instance}, '-',
              number);
}

CUresult mem_get_info(std::size_t* free_bytes, std::size_t* total) {
  Driver& driver = fakecuda::driver();
  if (free_bytes == nullptr || total == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const auto index = static_cast<std::size_t>(Driver::current()->device);
  const std::uint64_t used = driver.process.page().device_bytes[index].load() +
                             driver.process.sum_of_others([index](const ProcessPage& page) {
                               return page.device_bytes[index].load();
                             });
  *total = driver.device(static_cast<int>(index)).memory_bytes;
  *free_bytes = *total - std::min<std::uint64_t>(used, *total);
  return CUDA_SUCCESS;
}

CUresult mem_alloc(CUdeviceptr* pointer, std::size_t bytes) {
  return allocate(pointer, bytes, RangeKind::allocation);
}

CUresult mem_alloc_async(CUdeviceptr* pointer, std::size_t bytes, CUstream handle) {
  if (!driver().device(Driver::current()->device).pools) return CUDA_ERROR_NOT_SUPPORTED;
  const auto stream = driver().streams.find(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  return allocate(pointer, bytes, RangeKind::pool);
}

CUresult mem_alloc_managed(CUdeviceptr* pointer, std::size_t bytes, unsigned int flags) {
  if (pointer == nullptr || bytes == 0 ||
      (flags != CU_MEM_ATTACH_GLOBAL && flags != CU_MEM_ATTACH_HOST))
    return CUDA_ERROR_INVALID_VALUE;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  Range range;
  range.base = reinterpret_cast<std::uint64_t>(memory);
  range.bytes = bytes;
  range.cpu = static_cast<std::byte*>(memory);
  range.kind = RangeKind::managed;
  range.device = Driver::current()->device;
  range.context = Driver::current();
  driver().ranges.add(range);
  *pointer = range.base;
  return CUDA_SUCCESS;
}

CUresult mem_free(CUdeviceptr pointer) {
  Driver& driver = fakecuda::driver();
  Range* range = driver.ranges.find(pointer);
  if (range == nullptr || range->base != pointer) return CUDA_ERROR_INVALID_VALUE;
  if (range->kind != RangeKind::allocation && range->kind != RangeKind::pool &&
      range->kind != RangeKind::managed)
    return CUDA_ERROR_INVALID_VALUE;
  // In practice it often waits for the device; nothing promises that.
  if (driver.engine.is_pending(range->base, range->bytes))
    driver.violation(text("cuMemFree of ", Hex{pointer}, " while work on it is pending"));
  if (range->kind == RangeKind::managed) {
    ::munmap(range->cpu, range->bytes);
  } else if (range->kind == RangeKind::allocation) {
    complain_of_importers(range->backing->page(), range->base);
    range->backing->page().freed.store(1);
    range->backing->fill(kGone);
    ::unlink(driver.file_path("m-", driver.process.id(), range->file).c_str());
  }
  driver.release_range(pointer);
  return CUDA_SUCCESS;
}

CUresult mem_free_async(CUdeviceptr pointer, CUstream handle) {
  Driver& driver = fakecuda::driver();
  const auto stream = driver.streams.find(handle);
  if (stream == nullptr) return CUDA_ERROR_INVALID_HANDLE;
  const Range* range = driver.ranges.find(pointer);
  if (range == nullptr || range->base != pointer || range->kind != RangeKind::pool)
    return CUDA_ERROR_INVALID_VALUE;
  driver.engine.enqueue(*stream, PoolFree{pointer});
  return CUDA_SUCCESS;
}

CUresult mem_get_address_range(CUdeviceptr* base, std::size_t* bytes, CUdeviceptr pointer) {
  // Of a reservation with several mappings this is one of them, as on hardware.
  const Range* range = driver().ranges.find(pointer);
  if (range == nullptr) return driver().one_of({CUDA_ERROR_NOT_FOUND, CUDA_ERROR_INVALID_VALUE});
  if (base != nullptr) *base = range->base;
  if (bytes != nullptr) *bytes = range->bytes;
  return CUDA_SUCCESS;
}

namespace {

template <typename Value>
CUresult give(void* data, Value value) {
  std::memcpy(data, &value, sizeof value);
  return CUDA_SUCCESS;
}

CUresult give_attribute(void* data, CUpointer_attribute attribute, const Range& range,
                        std::uint64_t pointer) {
  Driver& driver = fakecuda::driver();
  const bool is_vmm = range.kind == RangeKind::vmm;
  const auto reservation = driver.reservations.find(range.reservation);
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT:
      // VMM and pool memory belong to no context.
      return range.context == nullptr || range.kind == RangeKind::pool
                 ? CUDA_ERROR_INVALID_VALUE
                 : give(data, range.context->handle());
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
      return give<unsigned int>(data, range.is_host() ? CU_MEMORYTYPE_HOST : CU_MEMORYTYPE_DEVICE);
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      return give(data, pointer);
    case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      return range.is_host() || range.kind == RangeKind::managed ? give(data, pointer)
                                                                 : CUDA_ERROR_INVALID_VALUE;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      return give<unsigned long long>(data, range.id);
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
      return give<unsigned int>(data, range.kind == RangeKind::managed ? 1 : 0);
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      return give<int>(data, driver.ordinal_of(range.device));
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
      return give<unsigned int>(
          data, range.kind == RangeKind::allocation && driver.device(range.device).ipc ? 1 : 0);
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      return give<CUdeviceptr>(data, is_vmm ? range.reservation : range.base);
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      return give<std::size_t>(data, is_vmm ? reservation->second.bytes : range.bytes);
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return give<unsigned int>(data, 1);
    case CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES:
      return give<unsigned long long>(data, is_vmm ? range.backing->page().handle_types : 0);
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE:
      return give(data, range.kind == RangeKind::pool ? default_pool(range.device) : nullptr);
    case CU_POINTER_ATTRIBUTE_MAPPING_SIZE:
      return give<std::size_t>(data, range.bytes);
    case CU_POINTER_ATTRIBUTE_MAPPING_BASE_ADDR:
      return give<CUdeviceptr>(data, range.base);
    default:
      return CUDA_ERROR_INVALID_VALUE;
  }
}

std::size_t attribute_bytes(CUpointer_attribute attribute) {
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE:
    case CU_POINTER_ATTRIBUTE_IS_MANAGED:
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
    case CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE:
    case CU_POINTER_ATTRIBUTE_MAPPED:
      return sizeof(int);
    default:
      return sizeof(std::uint64_t);
  }
}

}  // namespace

CUresult pointer_get_attribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  const Range* range = driver().ranges.find(pointer);
  if (data == nullptr || range == nullptr) return CUDA_ERROR_INVALID_VALUE;
  return give_attribute(data, attribute, *range, pointer);
}

CUresult pointer_get_attributes(unsigned int count, CUpointer_attribute* attributes, void** data,
                                CUdeviceptr pointer) {
  if (count == 0 || attributes == nullptr || data == nullptr) return CUDA_ERROR_INVALID_VALUE;
  const Range* range = driver().ranges.find(pointer);
  for (unsigned int i = 0; i < count; ++i) {
    // Of what is no CUDA pointer it tells zeros, where the call for one attribute fails.
    std::memset(data[i], 0, attribute_bytes(attributes[i]));
    if (attributes[i] == CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL) give<int>(data[i], CU_DEVICE_INVALID);
    if (range != nullptr) give_attribute(data[i], attributes[i], *range, pointer);
  }
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
