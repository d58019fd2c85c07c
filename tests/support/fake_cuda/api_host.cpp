// Pinned host memory.

#include <sys/mman.h>
#include <unistd.h>

#include <cinttypes>
#include <cstdio>
#include <memory>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

struct Mapped {
  bool everywhere = false;
  bool writable = true;
};

/// What the kernel says of a range of addresses. /proc, because mincore tells nothing of rights.
Mapped look_at(std::uint64_t begin, std::uint64_t end) {
  Mapped found;
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> maps(std::fopen("/proc/self/maps", "re"),
                                                             &std::fclose);
  if (maps == nullptr) return found;
  std::uint64_t covered = begin;
  char line[512];
  while (std::fgets(line, sizeof line, maps.get()) != nullptr) {
    std::uint64_t from = 0;
    std::uint64_t to = 0;
    char rights[5] = {};
    if (std::sscanf(line, "%" SCNx64 "-%" SCNx64 " %4s", &from, &to, rights) != 3) continue;
    if (to <= begin || from >= end) continue;
    if (from > covered || rights[0] != 'r') return found;
    found.writable = found.writable && rights[1] == 'w';
    covered = to;
  }
  found.everywhere = covered >= end;
  return found;
}

Range host_range(void* pointer, std::size_t bytes, RangeKind kind) {
  Range range;
  range.base = reinterpret_cast<std::uint64_t>(pointer);
  range.bytes = bytes;
  range.cpu = static_cast<std::byte*>(pointer);
  range.kind = kind;
  range.device = Driver::current()->device;
  range.context = Driver::current();
  return range;
}

Range* find_host(void* pointer, RangeKind kind) {
  Range* range = driver().ranges.find(reinterpret_cast<std::uint64_t>(pointer));
  const bool is_it = range != nullptr && range->kind == kind && range->cpu == pointer;
  return is_it ? range : nullptr;
}

void complain_if_pending(const Range& range, const char* call) {
  if (driver().engine.is_pending(range.base, range.bytes))
    driver().violation(text(call, " of ", Hex{range.base}, " while work on it is pending"));
}

}  // namespace

CUresult mem_host_alloc(void** pointer, std::size_t bytes, unsigned int flags) {
  constexpr unsigned int kFlags =
      CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP | CU_MEMHOSTALLOC_WRITECOMBINED;
  if (pointer == nullptr || bytes == 0 || (flags & ~kFlags) != 0) return CUDA_ERROR_INVALID_VALUE;
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return CUDA_ERROR_OUT_OF_MEMORY;
  driver().ranges.add(host_range(memory, bytes, RangeKind::host_allocation));
  *pointer = memory;
  return CUDA_SUCCESS;
}

CUresult mem_free_host(void* pointer) {
  Range* range = find_host(pointer, RangeKind::host_allocation);
  if (range == nullptr) return CUDA_ERROR_INVALID_VALUE;
  complain_if_pending(*range, "cuMemFreeHost");
  ::munmap(range->cpu, range->bytes);
  driver().release_range(range->base);
  return CUDA_SUCCESS;
}

CUresult mem_host_register(void* pointer, std::size_t bytes, unsigned int flags) {
  Driver& driver = fakecuda::driver();
  constexpr unsigned int kFlags = CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP |
                                  CU_MEMHOSTREGISTER_IOMEMORY | CU_MEMHOSTREGISTER_READ_ONLY;
  const auto begin = reinterpret_cast<std::uint64_t>(pointer);
  const bool read_only = (flags & CU_MEMHOSTREGISTER_READ_ONLY) != 0;
  if (pointer == nullptr || bytes == 0 || (flags & ~kFlags) != 0 || begin + bytes < begin)
    return CUDA_ERROR_INVALID_VALUE;
  if (bytes >= driver.configuration.host_register_max)
    return driver.one_of({CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_OUT_OF_MEMORY});
  if (read_only && !driver.device(Driver::current()->device).read_only_register)
    return CUDA_ERROR_NOT_SUPPORTED;
  if (driver.ranges.overlapping(begin, bytes) != nullptr)
    return CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED;
  const Mapped mapped = look_at(begin, begin + bytes);
  if (!mapped.everywhere) return CUDA_ERROR_INVALID_VALUE;
  if (!mapped.writable && !read_only)
    return driver.one_of({CUDA_ERROR_INVALID_VALUE, CUDA_ERROR_NOT_SUPPORTED});
  Range range = host_range(pointer, bytes, RangeKind::host_registration);
  range.read_only = read_only;
  driver.ranges.add(range);
  return CUDA_SUCCESS;
}

CUresult mem_host_unregister(void* pointer) {
  Range* range = find_host(pointer, RangeKind::host_registration);
  if (range == nullptr)
    return driver().one_of({CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED, CUDA_ERROR_INVALID_VALUE});
  complain_if_pending(*range, "cuMemHostUnregister");
  driver().release_range(range->base);
  return CUDA_SUCCESS;
}

CUresult mem_host_get_device_pointer(CUdeviceptr* device_pointer, void* pointer,
                                     unsigned int flags) {
  if (device_pointer == nullptr || flags != 0) return CUDA_ERROR_INVALID_VALUE;
  const Range* range = driver().ranges.find(reinterpret_cast<std::uint64_t>(pointer));
  if (range == nullptr || !range->is_host()) return CUDA_ERROR_INVALID_VALUE;
  *device_pointer = reinterpret_cast<CUdeviceptr>(pointer);
  return CUDA_SUCCESS;
}

}  // namespace fakecuda
