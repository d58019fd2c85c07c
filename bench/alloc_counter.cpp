// Counts the heap allocations of the process that it is preloaded into, in a file that others can
// map.
//
// A library for LD_PRELOAD; any thread enters it. The word stands in the file named by
// REFIT_BENCH_ALLOCATIONS, so that the count is read from outside and the counted program knows
// nothing of it. Stands on glibc's __libc_* entry points, which need no lookup and so cannot
// recurse into malloc. Must not allocate.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

extern "C" {
void* __libc_malloc(std::size_t);                 // NOLINT: glibc's names
void* __libc_calloc(std::size_t, std::size_t);    // NOLINT
void* __libc_realloc(void*, std::size_t);         // NOLINT
void* __libc_memalign(std::size_t, std::size_t);  // NOLINT
}

namespace {

std::atomic<std::uint64_t> fallback{0};
std::atomic<std::uint64_t>* counter = &fallback;

void count() noexcept { counter->fetch_add(1, std::memory_order_relaxed); }

__attribute__((constructor)) void open_counter() {
  const char* path = std::getenv("REFIT_BENCH_ALLOCATIONS");
  if (path == nullptr) return;
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  void* page = ::mmap(nullptr, sizeof(std::uint64_t), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (page == MAP_FAILED) return;
  auto* shared = static_cast<std::atomic<std::uint64_t>*>(page);
  shared->fetch_add(fallback.load());
  counter = shared;
}

}  // namespace

#define REFIT_EXPORT extern "C" __attribute__((visibility("default")))

REFIT_EXPORT void* malloc(std::size_t bytes) {
  count();
  return __libc_malloc(bytes);
}

REFIT_EXPORT void* calloc(std::size_t number, std::size_t bytes) {
  count();
  return __libc_calloc(number, bytes);
}

REFIT_EXPORT void* realloc(void* old, std::size_t bytes) {
  count();
  return __libc_realloc(old, bytes);
}

REFIT_EXPORT void* memalign(std::size_t align, std::size_t bytes) {
  count();
  return __libc_memalign(align, bytes);
}

REFIT_EXPORT void* aligned_alloc(std::size_t align, std::size_t bytes) {
  count();
  return __libc_memalign(align, bytes);
}

REFIT_EXPORT int posix_memalign(void** result, std::size_t align, std::size_t bytes) {
  count();
  void* memory = __libc_memalign(align, bytes);
  if (memory == nullptr) return ENOMEM;
  *result = memory;
  return 0;
}
