#include "memory/cuda/driver.hpp"

#include <dlfcn.h>

#include <mutex>

namespace refit::cuda {
namespace {

/// What finds the others; cuGetProcAddress itself has had two ABIs.
struct Resolver {
  PFN_cuGetProcAddress_v12000 by_12000 = nullptr;
  PFN_cuGetProcAddress_v11030 by_11030 = nullptr;

  /// Null if this driver does not have it. Never asked for a version above the driver's own, which
  /// is an error of the call and not an answer.
  [[nodiscard]] void* find(const char* name, int abi) const {
    void* found = nullptr;
    CUresult code = CUDA_ERROR_NOT_FOUND;
    if (by_12000 != nullptr) {
      CUdriverProcAddressQueryResult status{};
      code = by_12000(name, &found, abi, CU_GET_PROC_ADDRESS_LEGACY_STREAM, &status);
      if (status != CU_GET_PROC_ADDRESS_SUCCESS) return nullptr;
    } else {
      code = by_11030(name, &found, abi, CU_GET_PROC_ADDRESS_LEGACY_STREAM);
    }
    return code == CUDA_SUCCESS ? found : nullptr;
  }
};

template <typename Function>
Function symbol(void* library, const char* name) {
  return reinterpret_cast<Function>(::dlsym(library, name));
}

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

Unexpected fail_cuda(const Driver& driver, const std::string& what, CUresult code) {
  const char* name = nullptr;
  const char* text = nullptr;
  if (driver.get_error_name != nullptr) driver.get_error_name(code, &name);
  if (driver.get_error_string != nullptr) driver.get_error_string(code, &text);
  std::string message = what + ": " + (name != nullptr ? name : "CUDA error") + " (" +
                        std::to_string(static_cast<int>(code)) + ")";
  if (text != nullptr) message += std::string(", ") + text;
  return Unexpected(Error{Errc::cuda, static_cast<int>(code), std::move(message), {}});
}

bool is_sticky(CUresult code) noexcept {
  switch (code) {
    case CUDA_ERROR_ECC_UNCORRECTABLE:
    case CUDA_ERROR_ILLEGAL_ADDRESS:
    case CUDA_ERROR_LAUNCH_TIMEOUT:
    case CUDA_ERROR_ASSERT:
    case CUDA_ERROR_HARDWARE_STACK_ERROR:
    case CUDA_ERROR_ILLEGAL_INSTRUCTION:
    case CUDA_ERROR_MISALIGNED_ADDRESS:
    case CUDA_ERROR_INVALID_ADDRESS_SPACE:
    case CUDA_ERROR_INVALID_PC:
    case CUDA_ERROR_LAUNCH_FAILED:
    case CUDA_ERROR_CONTEXT_IS_DESTROYED:
      return true;
    default:
      return false;
  }
}

Result<Driver> Driver::load(DriverState& state) {
  state = DriverState::no_library;
  // Never closed: the driver keeps threads of its own.
  void* const library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return fail(Errc::unsupported,
                std::string("no CUDA driver on this host: ") + ::dlerror() +
                    "; install NVIDIA's driver, or give the container its libcuda.so.1");
  }
  Driver driver;
  state = DriverState::failed;
  const auto get_version = symbol<PFN_cuDriverGetVersion_v2020>(library, "cuDriverGetVersion");
  const auto init = symbol<PFN_cuInit_v2000>(library, "cuInit");
  if (get_version == nullptr || init == nullptr)
    return fail(Errc::unsupported, "libcuda.so.1 has no cuInit: it is not NVIDIA's driver");
  CUresult code = get_version(&driver.version_);
  if (code == CUDA_SUCCESS) code = init(0);
  if (code == CUDA_ERROR_STUB_LIBRARY) {
    state = DriverState::stub;
    return fail(Errc::unsupported,
                "the libcuda.so.1 that was found is the CUDA toolkit's stub, which only links: "
                "take its folder out of LD_LIBRARY_PATH");
  }
  if (code == CUDA_ERROR_NO_DEVICE) {
    state = DriverState::no_device;
    return fail(Errc::unsupported,
                "the CUDA driver sees no GPU: look at nvidia-smi, CUDA_VISIBLE_DEVICES and, in a "
                "container or a sandboxed unit, at the device nodes /dev/nvidia*");
  }
  if (code != CUDA_SUCCESS) return fail_cuda(driver, "starting the CUDA driver (cuInit)", code);

  state = DriverState::too_old;
  const Resolver resolver{symbol<PFN_cuGetProcAddress_v12000>(library, "cuGetProcAddress_v2"),
                          symbol<PFN_cuGetProcAddress_v11030>(library, "cuGetProcAddress")};
  const std::string own = "the CUDA driver is of version " + version_text(driver.version_);
  if (resolver.by_12000 == nullptr && resolver.by_11030 == nullptr)
    return fail(Errc::unsupported, own + ", refit needs 11.4: update the driver");
#define REFIT_X(member, name, abi)                                                    \
  if ((abi) <= driver.version_)                                                       \
    driver.member = reinterpret_cast<PFN_##name##_v##abi>(resolver.find(#name, abi)); \
  if (driver.member == nullptr)                                                       \
    return fail(Errc::unsupported, own + " and has no " #name ": refit needs 11.4 or newer");
  REFIT_CUDA_REQUIRED(REFIT_X)
#undef REFIT_X
#define REFIT_X(member, name, abi) \
  if ((abi) <= driver.version_)    \
    driver.member = reinterpret_cast<PFN_##name##_v##abi>(resolver.find(#name, abi));
  REFIT_CUDA_OPTIONAL(REFIT_X)
#undef REFIT_X

  int count = 0;
  state = DriverState::failed;
  REFIT_TRY_CUDA(driver, device_get_count(&count), "counting devices (cuDeviceGetCount)");
  if (count == 0) {
    state = DriverState::no_device;
    return fail(Errc::unsupported, "the CUDA driver sees no GPU: look at CUDA_VISIBLE_DEVICES");
  }
  state = DriverState::ready;
  return driver;
}

struct Driver::Search {
  std::mutex mutex;
  bool ended = false;  ///< it would find the same again
  DriverState state = DriverState::failed;
  Result<Driver> found;  ///< stays where it is once there is one

  void look() {
    if (ended) return;
    found = load(state);
    ended =
        state == DriverState::ready || state == DriverState::stub || state == DriverState::too_old;
  }
};

Driver::Search& Driver::search() {
  static Search once;
  return once;
}

Result<const Driver*> Driver::get() {
  Search& search = Driver::search();
  const std::lock_guard lock(search.mutex);
  search.look();
  if (!search.found) return Unexpected(search.found.error());
  return &*search.found;
}

DriverState Driver::state() {
  Search& search = Driver::search();
  const std::lock_guard lock(search.mutex);
  search.look();
  return search.state;
}

}  // namespace refit::cuda
