#include "support/cuda/driver.hpp"

#include <dlfcn.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <mutex>

namespace refit::test::cuda {
namespace {

[[noreturn]] void give_up(const char* what) {
  std::fprintf(stderr, "the test's CUDA driver: %s\n", what);
  std::abort();
}

void* library() {
  static void* const kLibrary = [] {
    void* const found = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (found == nullptr) give_up(::dlerror());
    return found;
  }();
  return kLibrary;
}

Driver load() {
  Driver driver;
  const auto resolve =
      reinterpret_cast<PFN_cuGetProcAddress_v12000>(::dlsym(library(), "cuGetProcAddress_v2"));
  if (resolve == nullptr) give_up("no cuGetProcAddress_v2");
  const auto bind = [&](const char* name, int version, auto& function) {
    void* found = nullptr;
    if (resolve(name, &found, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr) != CUDA_SUCCESS ||
        found == nullptr)
      give_up(name);
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(found);
  };
#define REFIT_X(name, version) bind(#name, version, driver.name);
  REFIT_TEST_CUDA_CALLS(REFIT_X)
#undef REFIT_X
#define REFIT_X(name, version)                                                               \
  if (void* found = nullptr;                                                                 \
      resolve(#name, &found, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr) == CUDA_SUCCESS) \
    driver.name = reinterpret_cast<PFN_##name##_v##version>(found);
  REFIT_TEST_CUDA_OPTIONAL_CALLS(REFIT_X)
#undef REFIT_X
  must(driver.cuInit(0), "cuInit");
  return driver;
}

constexpr std::size_t kDevicesMax = 16;
std::mutex contexts_mutex;
std::array<CUcontext, kDevicesMax> contexts{};

CUcontext context_of(int device) {
  const std::lock_guard lock(contexts_mutex);
  CUcontext& context = contexts.at(static_cast<std::size_t>(device));
  if (context == nullptr)
    must(Driver::get().cuDevicePrimaryCtxRetain(&context, device), "cuDevicePrimaryCtxRetain");
  return context;
}

}  // namespace

const Driver& Driver::get() {
  static const Driver kDriver = load();
  return kDriver;
}

const std::optional<fakecuda::Control>& Driver::fake() {
  get();  // it can be asked once it is there
  static const std::optional<fakecuda::Control> kControl = fakecuda::Control::of(library());
  return kControl;
}

int device_count() {
  int count = 0;
  must(Driver::get().cuDeviceGetCount(&count), "cuDeviceGetCount");
  return count;
}

void must(CUresult code, const char* call) {
  if (code == CUDA_SUCCESS) return;
  std::fprintf(stderr, "fixture failed: %s answered %d\n", call, static_cast<int>(code));
  std::abort();
}

Current::Current(int device) {
  must(Driver::get().cuCtxPushCurrent(context_of(device)), "cuCtxPushCurrent");
}

Current::~Current() {
  CUcontext popped = nullptr;
  must(Driver::get().cuCtxPopCurrent(&popped), "cuCtxPopCurrent");
}

void release_contexts() {
  const std::lock_guard lock(contexts_mutex);
  for (std::size_t i = 0; i < contexts.size(); ++i) {
    if (contexts[i] != nullptr)
      must(Driver::get().cuDevicePrimaryCtxRelease(static_cast<int>(i)),
           "cuDevicePrimaryCtxRelease");
    contexts[i] = nullptr;
  }
}

}  // namespace refit::test::cuda
