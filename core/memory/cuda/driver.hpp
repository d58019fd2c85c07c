// The CUDA driver, found at run time: the functions that refit uses, each asked for by name and by
// the version whose ABI this was compiled against. No libcudart; without a driver the same binary
// runs and says what is missing.
//
// Loaded once per process, on first use, by any thread; afterwards read only. A host that has none
// yet is looked at again. A process that forks after it was loaded must exec. Facts of the API:
// cuda.h and cudaTypedefs.h of CUDA 13.0.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <string>

#include "refit/result.hpp"

namespace refit::cuda {

// X(member, name, version of the ABI). A driver without one of these is too old.
#define REFIT_CUDA_REQUIRED(X)                                                    \
  X(get_error_name, cuGetErrorName, 6000)                                         \
  X(get_error_string, cuGetErrorString, 6000)                                     \
  X(device_get, cuDeviceGet, 2000)                                                \
  X(device_get_count, cuDeviceGetCount, 2000)                                     \
  X(device_get_name, cuDeviceGetName, 2000)                                       \
  X(device_get_uuid, cuDeviceGetUuid, 11040)                                      \
  X(device_get_attribute, cuDeviceGetAttribute, 2000)                             \
  X(device_total_mem, cuDeviceTotalMem, 3020)                                     \
  X(device_can_access_peer, cuDeviceCanAccessPeer, 4000)                          \
  X(primary_ctx_retain, cuDevicePrimaryCtxRetain, 7000)                           \
  X(primary_ctx_release, cuDevicePrimaryCtxRelease, 11000)                        \
  X(ctx_push_current, cuCtxPushCurrent, 4000)                                     \
  X(ctx_pop_current, cuCtxPopCurrent, 4000)                                       \
  X(ctx_synchronize, cuCtxSynchronize, 2000)                                      \
  X(ctx_enable_peer_access, cuCtxEnablePeerAccess, 4000)                          \
  X(mem_get_address_range, cuMemGetAddressRange, 3020)                            \
  X(pointer_get_attribute, cuPointerGetAttribute, 4000)                           \
  X(ipc_get_mem_handle, cuIpcGetMemHandle, 4010)                                  \
  X(ipc_open_mem_handle, cuIpcOpenMemHandle, 11000)                               \
  X(ipc_close_mem_handle, cuIpcCloseMemHandle, 4010)                              \
  X(ipc_get_event_handle, cuIpcGetEventHandle, 4010)                              \
  X(ipc_open_event_handle, cuIpcOpenEventHandle, 4010)                            \
  X(mem_retain_allocation_handle, cuMemRetainAllocationHandle, 11000)             \
  X(mem_get_allocation_properties, cuMemGetAllocationPropertiesFromHandle, 10020) \
  X(mem_get_allocation_granularity, cuMemGetAllocationGranularity, 10020)         \
  X(mem_export_to_shareable_handle, cuMemExportToShareableHandle, 10020)          \
  X(mem_import_from_shareable_handle, cuMemImportFromShareableHandle, 10020)      \
  X(mem_address_reserve, cuMemAddressReserve, 10020)                              \
  X(mem_address_free, cuMemAddressFree, 10020)                                    \
  X(mem_map, cuMemMap, 10020)                                                     \
  X(mem_unmap, cuMemUnmap, 10020)                                                 \
  X(mem_set_access, cuMemSetAccess, 10020)                                        \
  X(mem_release, cuMemRelease, 10020)                                             \
  X(mem_host_register, cuMemHostRegister, 6050)                                   \
  X(mem_host_unregister, cuMemHostUnregister, 4000)                               \
  X(memcpy_async, cuMemcpyAsync, 4000)                                            \
  X(stream_create, cuStreamCreate, 2000)                                          \
  X(stream_destroy, cuStreamDestroy, 4000)                                        \
  X(stream_synchronize, cuStreamSynchronize, 2000)                                \
  X(stream_wait_event, cuStreamWaitEvent, 3020)                                   \
  X(event_create, cuEventCreate, 2000)                                            \
  X(event_record, cuEventRecord, 2000)                                            \
  X(event_query, cuEventQuery, 2000)                                              \
  X(event_synchronize, cuEventSynchronize, 2000)                                  \
  X(event_destroy, cuEventDestroy, 4000)

// X(member, name, version). Null where the driver has none; whoever uses one has another way, or
// refuses what needs it.
#define REFIT_CUDA_OPTIONAL(X)                      \
  X(memcpy_batch_12080, cuMemcpyBatchAsync, 12080)  \
  X(memcpy_batch_13000, cuMemcpyBatchAsync, 13000)  \
  X(module_load_data, cuModuleLoadData, 2000)       \
  X(module_get_function, cuModuleGetFunction, 2000) \
  X(module_unload, cuModuleUnload, 2000)            \
  X(launch_kernel, cuLaunchKernel, 4000)            \
  X(mem_alloc, cuMemAlloc, 3020)                    \
  X(mem_free, cuMemFree, 3020)

/// Why there is a driver, or none. For `refitctl doctor` and for messages.
enum class DriverState {
  ready,
  no_library,  ///< no libcuda.so.1 on this host
  stub,        ///< the toolkit's stand-in, which only links
  no_device,   ///< a driver, but it sees no GPU
  too_old,     ///< a function that refit needs is missing
  failed,      ///< a call failed otherwise
};

class Driver {
 public:
  /// The loaded driver, the same for every caller. After an error that may pass (no library, no
  /// device, a call that failed) the next call looks again. Errors: Errc::unsupported without
  /// library, device or a recent enough driver, Errc::cuda where a call failed; the message says
  /// what to do.
  [[nodiscard]] static Result<const Driver*> get();
  /// What get() finds, without an error's words. Loads the driver.
  [[nodiscard]] static DriverState state();

  /// As cuDriverGetVersion: 13000 is CUDA 13.0.
  [[nodiscard]] int version() const noexcept { return version_; }

#define REFIT_X(member, name, abi) PFN_##name##_v##abi member = nullptr;
  REFIT_CUDA_REQUIRED(REFIT_X)
  REFIT_CUDA_OPTIONAL(REFIT_X)
#undef REFIT_X

 private:
  struct Search;
  static Search& search();
  static Result<Driver> load(DriverState& state);
  int version_ = 0;
};

/// An environment failure of the driver: `what` names the call and its object.
[[nodiscard]] Unexpected fail_cuda(const Driver& driver, const std::string& what, CUresult code);

/// True for the errors after which a context answers nothing else any more (an illegal address, a
/// launch failure): the process must end, and another begin.
[[nodiscard]] bool is_sticky(CUresult code) noexcept;

}  // namespace refit::cuda

/// Returns Errc::cuda from the enclosing function unless `call` succeeds; `what` is a std::string
/// that is only built then.
#define REFIT_TRY_CUDA(driver, call, what)                                             \
  do {                                                                                 \
    if (const CUresult refit_try_code = (driver).call; refit_try_code != CUDA_SUCCESS) \
      return ::refit::cuda::fail_cuda((driver), (what), refit_try_code);               \
  } while (false)
