// cuInit, versions, cuGetProcAddress, error names.

#include <algorithm>
#include <map>
#include <string_view>

#include "support/fake_cuda/calls.hpp"
#include "support/fake_cuda/driver.hpp"
#include "support/fake_cuda/functions.hpp"

namespace fakecuda {
namespace {

const char* error_name(CUresult error) {
  static const std::map<CUresult, const char*> kNames{
#define NAME(code) {code, #code}
      NAME(CUDA_SUCCESS),
      NAME(CUDA_ERROR_INVALID_VALUE),
      NAME(CUDA_ERROR_OUT_OF_MEMORY),
      NAME(CUDA_ERROR_NOT_INITIALIZED),
      NAME(CUDA_ERROR_DEINITIALIZED),
      NAME(CUDA_ERROR_STUB_LIBRARY),
      NAME(CUDA_ERROR_DEVICE_UNAVAILABLE),
      NAME(CUDA_ERROR_NO_DEVICE),
      NAME(CUDA_ERROR_INVALID_DEVICE),
      NAME(CUDA_ERROR_INVALID_IMAGE),
      NAME(CUDA_ERROR_INVALID_CONTEXT),
      NAME(CUDA_ERROR_MAP_FAILED),
      NAME(CUDA_ERROR_ALREADY_MAPPED),
      NAME(CUDA_ERROR_NO_BINARY_FOR_GPU),
      NAME(CUDA_ERROR_ECC_UNCORRECTABLE),
      NAME(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED),
      NAME(CUDA_ERROR_OPERATING_SYSTEM),
      NAME(CUDA_ERROR_INVALID_HANDLE),
      NAME(CUDA_ERROR_ILLEGAL_STATE),
      NAME(CUDA_ERROR_NOT_FOUND),
      NAME(CUDA_ERROR_NOT_READY),
      NAME(CUDA_ERROR_ILLEGAL_ADDRESS),
      NAME(CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED),
      NAME(CUDA_ERROR_PEER_ACCESS_NOT_ENABLED),
      NAME(CUDA_ERROR_PRIMARY_CONTEXT_ACTIVE),
      NAME(CUDA_ERROR_CONTEXT_IS_DESTROYED),
      NAME(CUDA_ERROR_TOO_MANY_PEERS),
      NAME(CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED),
      NAME(CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED),
      NAME(CUDA_ERROR_LAUNCH_FAILED),
      NAME(CUDA_ERROR_NOT_PERMITTED),
      NAME(CUDA_ERROR_NOT_SUPPORTED),
      NAME(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH),
      NAME(CUDA_ERROR_UNKNOWN),
#undef NAME
  };
  const auto found = kNames.find(error);
  return found == kNames.end() ? nullptr : found->second;
}

int driver_version() {
  // May be asked before cuInit.
  return driver().initialised_pid != 0 ? driver().configuration.driver_version
                                       : Configuration::from_environment().driver_version;
}

}  // namespace

CUresult init(unsigned int flags) {
  if (flags != 0) return CUDA_ERROR_INVALID_VALUE;
  return driver().initialised_pid != 0 ? CUDA_SUCCESS : driver().start();
}

CUresult driver_get_version(int* version) {
  if (version == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *version = driver_version();
  return CUDA_SUCCESS;
}

CUresult get_proc_address_with_status(const char* symbol, void** function, int version,
                                      cuuint64_t flags, CUdriverProcAddressQueryResult* status) {
  constexpr cuuint64_t kKnownFlags =
      CU_GET_PROC_ADDRESS_LEGACY_STREAM | CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM;
  // The header says so of the version: on a 12.8 driver a question for 13000 fails as a call.
  if (symbol == nullptr || function == nullptr || (flags & ~kKnownFlags) != 0 ||
      version > driver_version())
    return CUDA_ERROR_INVALID_VALUE;
  const EntryPoint* best = nullptr;
  bool known = false;
  for (std::size_t i = 0; i < static_cast<std::size_t>(Entry::count); ++i) {
    const EntryPoint& point = entry_point(static_cast<Entry>(i));
    if (std::string_view(point.name) != symbol || point.version > driver_version()) continue;
    known = true;
    if (point.version <= version && (best == nullptr || point.version >= best->version))
      best = &point;
  }
  *function = best == nullptr ? nullptr : best->address;
  if (status != nullptr) {
    *status = best != nullptr ? CU_GET_PROC_ADDRESS_SUCCESS
              : known         ? CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT
                              : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  }
  return CUDA_SUCCESS;
}

CUresult get_proc_address(const char* symbol, void** function, int version, cuuint64_t flags) {
  const CUresult result = get_proc_address_with_status(symbol, function, version, flags, nullptr);
  // Without a status the first ABI tells a missing symbol by its result.
  return result == CUDA_SUCCESS && *function == nullptr ? CUDA_ERROR_NOT_FOUND : result;
}

CUresult get_error_name(CUresult error, const char** name) {
  if (name == nullptr) return CUDA_ERROR_INVALID_VALUE;
  *name = error_name(error);
  return *name == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult get_error_string(CUresult error, const char** string) {
  return get_error_name(error, string);
}

}  // namespace fakecuda
