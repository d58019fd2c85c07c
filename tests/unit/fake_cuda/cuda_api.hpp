// CudaApi: the driver as a client sees it, loaded with dlopen and resolved by name and version.
//
// It is the whole use of the library by these tests, in this process and in their peer.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>

#include "support/fake_cuda/fake_cuda.hpp"

namespace fakecuda::test {

// FUNCTION(name, version): the version whose ABI the call is compiled for.
#define FAKECUDA_TEST_FUNCTIONS(FUNCTION)                 \
  FUNCTION(cuInit, 2000)                                  \
  FUNCTION(cuDriverGetVersion, 2020)                      \
  FUNCTION(cuGetErrorName, 6000)                          \
  FUNCTION(cuDeviceGet, 2000)                             \
  FUNCTION(cuDeviceGetCount, 2000)                        \
  FUNCTION(cuDeviceGetName, 2000)                         \
  FUNCTION(cuDeviceGetUuid, 11040)                        \
  FUNCTION(cuDeviceGetAttribute, 2000)                    \
  FUNCTION(cuDeviceTotalMem, 3020)                        \
  FUNCTION(cuDeviceGetPCIBusId, 4010)                     \
  FUNCTION(cuDeviceCanAccessPeer, 4000)                   \
  FUNCTION(cuDevicePrimaryCtxRetain, 7000)                \
  FUNCTION(cuDevicePrimaryCtxRelease, 11000)              \
  FUNCTION(cuDevicePrimaryCtxGetState, 7000)              \
  FUNCTION(cuCtxPushCurrent, 4000)                        \
  FUNCTION(cuCtxPopCurrent, 4000)                         \
  FUNCTION(cuCtxSetCurrent, 4000)                         \
  FUNCTION(cuCtxGetCurrent, 4000)                         \
  FUNCTION(cuCtxGetDevice, 2000)                          \
  FUNCTION(cuCtxSynchronize, 2000)                        \
  FUNCTION(cuCtxGetStreamPriorityRange, 5050)             \
  FUNCTION(cuCtxEnablePeerAccess, 4000)                   \
  FUNCTION(cuMemGetInfo, 3020)                            \
  FUNCTION(cuMemAlloc, 3020)                              \
  FUNCTION(cuMemFree, 3020)                               \
  FUNCTION(cuMemGetAddressRange, 3020)                    \
  FUNCTION(cuMemAllocManaged, 6000)                       \
  FUNCTION(cuMemAllocAsync, 11020)                        \
  FUNCTION(cuMemFreeAsync, 11020)                         \
  FUNCTION(cuPointerGetAttribute, 4000)                   \
  FUNCTION(cuPointerGetAttributes, 7000)                  \
  FUNCTION(cuMemHostAlloc, 2020)                          \
  FUNCTION(cuMemFreeHost, 2000)                           \
  FUNCTION(cuMemHostRegister, 6050)                       \
  FUNCTION(cuMemHostUnregister, 4000)                     \
  FUNCTION(cuMemHostGetDevicePointer, 3020)               \
  FUNCTION(cuIpcGetMemHandle, 4010)                       \
  FUNCTION(cuIpcOpenMemHandle, 11000)                     \
  FUNCTION(cuIpcCloseMemHandle, 4010)                     \
  FUNCTION(cuIpcGetEventHandle, 4010)                     \
  FUNCTION(cuIpcOpenEventHandle, 4010)                    \
  FUNCTION(cuMemGetAllocationGranularity, 10020)          \
  FUNCTION(cuMemCreate, 10020)                            \
  FUNCTION(cuMemRelease, 10020)                           \
  FUNCTION(cuMemAddressReserve, 10020)                    \
  FUNCTION(cuMemAddressFree, 10020)                       \
  FUNCTION(cuMemMap, 10020)                               \
  FUNCTION(cuMemUnmap, 10020)                             \
  FUNCTION(cuMemSetAccess, 10020)                         \
  FUNCTION(cuMemGetAccess, 10020)                         \
  FUNCTION(cuMemExportToShareableHandle, 10020)           \
  FUNCTION(cuMemImportFromShareableHandle, 10020)         \
  FUNCTION(cuMemGetAllocationPropertiesFromHandle, 10020) \
  FUNCTION(cuMemRetainAllocationHandle, 11000)            \
  FUNCTION(cuMemcpyAsync, 4000)                           \
  FUNCTION(cuMemcpyHtoDAsync, 3020)                       \
  FUNCTION(cuMemcpyDtoHAsync, 3020)                       \
  FUNCTION(cuMemcpyDtoDAsync, 3020)                       \
  FUNCTION(cuMemcpyPeerAsync, 4000)                       \
  FUNCTION(cuMemcpy2DAsync, 3020)                         \
  FUNCTION(cuMemsetD8Async, 3020)                         \
  FUNCTION(cuMemcpyHtoD, 3020)                            \
  FUNCTION(cuMemcpyDtoH, 3020)                            \
  FUNCTION(cuMemcpyDtoD, 3020)                            \
  FUNCTION(cuStreamCreate, 2000)                          \
  FUNCTION(cuStreamCreateWithPriority, 5050)              \
  FUNCTION(cuStreamDestroy, 4000)                         \
  FUNCTION(cuStreamSynchronize, 2000)                     \
  FUNCTION(cuStreamQuery, 2000)                           \
  FUNCTION(cuStreamWaitEvent, 3020)                       \
  FUNCTION(cuEventCreate, 2000)                           \
  FUNCTION(cuEventDestroy, 4000)                          \
  FUNCTION(cuEventRecord, 2000)                           \
  FUNCTION(cuEventQuery, 2000)                            \
  FUNCTION(cuEventSynchronize, 2000)                      \
  FUNCTION(cuModuleLoadData, 2000)                        \
  FUNCTION(cuModuleGetFunction, 2000)                     \
  FUNCTION(cuModuleUnload, 2000)                          \
  FUNCTION(cuLaunchKernel, 4000)

struct CudaApi {
#define FUNCTION(name, version) PFN_##name##_v##version name = nullptr;
  FAKECUDA_TEST_FUNCTIONS(FUNCTION)
#undef FUNCTION
  /// Null where the driver is too old for them.
  PFN_cuMemcpyBatchAsync_v12080 batch_12080 = nullptr;
  PFN_cuMemcpyBatchAsync_v13000 batch_13000 = nullptr;
  PFN_cuGetProcAddress_v12000 resolve = nullptr;
  Control control;
  void* library = nullptr;

  static const CudaApi& get() {
    static const CudaApi api;
    return api;
  }

 private:
  CudaApi() {
    library = ::dlopen(FAKE_CUDA_PATH, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) give_up(::dlerror());
    control = Control::of(library).value();
    resolve =
        reinterpret_cast<PFN_cuGetProcAddress_v12000>(::dlsym(library, "cuGetProcAddress_v2"));
#define FUNCTION(name, version) bind(#name, version, name);
    FAKECUDA_TEST_FUNCTIONS(FUNCTION)
#undef FUNCTION
    bind_optional("cuMemcpyBatchAsync", 12080, batch_12080);
    bind_optional("cuMemcpyBatchAsync", 13000, batch_13000);
  }

  template <typename Function>
  bool bind_optional(const char* name, int version, Function& function) {
    void* found = nullptr;
    if (resolve(name, &found, version, CU_GET_PROC_ADDRESS_DEFAULT, nullptr) != CUDA_SUCCESS)
      return false;
    function = reinterpret_cast<Function>(found);
    return found != nullptr;
  }
  template <typename Function>
  void bind(const char* name, int version, Function& function) {
    if (!bind_optional(name, version, function)) give_up(name);
  }
  [[noreturn]] static void give_up(const char* what) {
    std::fprintf(stderr, "cannot load the fake driver: %s\n", what);
    std::abort();
  }
};

inline const CudaApi& cuda() { return CudaApi::get(); }

}  // namespace fakecuda::test
