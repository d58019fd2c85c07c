// Counts the calls of the CUDA driver that the process makes which it is preloaded into, in a file
// that others can map.
//
// A library for LD_PRELOAD; any thread enters it. refitd finds the driver's functions by dlsym and
// cuGetProcAddress, so that the one stands here and answers with another one of the other, which
// answers with functions that count and go on. The list is that of core/memory/cuda/driver.hpp:
// refitd asks for nothing else. Works on any driver, and the driver knows nothing of it.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "driver_calls.hpp"
#include "memory/cuda/driver.hpp"

namespace {

using refit::bench::DriverCalls;

enum Entry : std::size_t {
#define REFIT_X(member, symbol, abi) k_##member,
  REFIT_CUDA_REQUIRED(REFIT_X) REFIT_CUDA_OPTIONAL(REFIT_X)
#undef REFIT_X
      kEntries
};
static_assert(kEntries < DriverCalls::kEntriesMax);

DriverCalls* calls = nullptr;

__attribute__((constructor)) void open_counter() {
  const char* path = std::getenv(DriverCalls::kVariable);
  if (path == nullptr) return;
  const int fd = ::open(path, O_RDWR | O_CLOEXEC);
  if (fd < 0) return;
  void* page = ::mmap(nullptr, sizeof(DriverCalls), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ::close(fd);
  if (page == MAP_FAILED) return;
  calls = static_cast<DriverCalls*>(page);
#define REFIT_X(member, symbol, abi) \
  std::strncpy(calls->entries[k_##member].name, #symbol, sizeof(DriverCalls::Entry::name) - 1);
  REFIT_CUDA_REQUIRED(REFIT_X)
  REFIT_CUDA_OPTIONAL(REFIT_X)
#undef REFIT_X
}

template <Entry entry, typename Function>
struct Counted;
template <Entry entry, typename... Arguments>
struct Counted<entry, CUresult (*)(Arguments...)> {
  static inline CUresult (*target)(Arguments...) = nullptr;
  static CUresult call(Arguments... arguments) {
    calls->entries[entry].count.fetch_add(1, std::memory_order_relaxed);
    return target(arguments...);
  }
};

void* counted(const char* asked, int version, void* found) {
  if (calls == nullptr || found == nullptr) return found;
#define REFIT_X(member, symbol, abi)                               \
  if (version == (abi) && std::strcmp(asked, #symbol) == 0) {      \
    using Call = Counted<k_##member, PFN_##symbol##_v##abi>;       \
    Call::target = reinterpret_cast<PFN_##symbol##_v##abi>(found); \
    return reinterpret_cast<void*>(&Call::call);                   \
  }
  REFIT_CUDA_REQUIRED(REFIT_X)
  REFIT_CUDA_OPTIONAL(REFIT_X)
#undef REFIT_X
  return found;
}

PFN_cuGetProcAddress_v12000 resolve_12000 = nullptr;
PFN_cuGetProcAddress_v11030 resolve_11030 = nullptr;

CUresult counting_resolve_12000(const char* name, void** function, int version, cuuint64_t flags,
                                CUdriverProcAddressQueryResult* status) {
  const CUresult code = resolve_12000(name, function, version, flags, status);
  if (code == CUDA_SUCCESS) *function = counted(name, version, *function);
  return code;
}

CUresult counting_resolve_11030(const char* name, void** function, int version, cuuint64_t flags) {
  const CUresult code = resolve_11030(name, function, version, flags);
  if (code == CUDA_SUCCESS) *function = counted(name, version, *function);
  return code;
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void* dlsym(
    void* __restrict library, const char* __restrict name) noexcept {
  using Dlsym = void* (*)(void*, const char*);
  // The version of glibc that moved it into libc.so.6: older ones are not supported.
  static const auto real = reinterpret_cast<Dlsym>(::dlvsym(RTLD_NEXT, "dlsym", "GLIBC_2.34"));
  void* const found = real(library, name);
  if (found == nullptr) return nullptr;
  if (std::strcmp(name, "cuGetProcAddress_v2") == 0) {
    resolve_12000 = reinterpret_cast<PFN_cuGetProcAddress_v12000>(found);
    return reinterpret_cast<void*>(&counting_resolve_12000);
  }
  if (std::strcmp(name, "cuGetProcAddress") == 0) {
    resolve_11030 = reinterpret_cast<PFN_cuGetProcAddress_v11030>(found);
    return reinterpret_cast<void*>(&counting_resolve_11030);
  }
  return found;
}
