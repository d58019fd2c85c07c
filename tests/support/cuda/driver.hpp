// The driver calls that tests make as a trainer or an engine would: allocate, write, read back.
//
// Found by name at run time, as in the product, but with a table of its own: what is tested does
// not test itself. Whatever libcuda.so.1 the loader finds is taken; of the fake one there is more
// to ask (fake()). Any thread.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <optional>

#include "support/fake_cuda/fake_cuda.hpp"

namespace refit::test::cuda {

// X(name, version of the ABI)
#define REFIT_TEST_CUDA_CALLS(X)          \
  X(cuInit, 2000)                         \
  X(cuDeviceGetCount, 2000)               \
  X(cuDeviceGetUuid, 11040)               \
  X(cuDevicePrimaryCtxRetain, 7000)       \
  X(cuDevicePrimaryCtxRelease, 11000)     \
  X(cuCtxPushCurrent, 4000)               \
  X(cuCtxPopCurrent, 4000)                \
  X(cuCtxSynchronize, 2000)               \
  X(cuMemAlloc, 3020)                     \
  X(cuMemAllocManaged, 6000)              \
  X(cuMemFree, 3020)                      \
  X(cuMemHostAlloc, 2020)                 \
  X(cuMemFreeHost, 2000)                  \
  X(cuMemGetAllocationGranularity, 10020) \
  X(cuMemCreate, 10020)                   \
  X(cuMemRelease, 10020)                  \
  X(cuMemAddressReserve, 10020)           \
  X(cuMemAddressFree, 10020)              \
  X(cuMemMap, 10020)                      \
  X(cuMemUnmap, 10020)                    \
  X(cuMemSetAccess, 10020)                \
  X(cuMemcpyHtoD, 3020)                   \
  X(cuMemcpyDtoH, 3020)                   \
  X(cuMemcpyHtoDAsync, 3020)              \
  X(cuMemcpyDtoDAsync, 3020)              \
  X(cuMemcpyDtoHAsync, 3020)              \
  X(cuMemsetD8Async, 3020)                \
  X(cuMemHostRegister, 6050)              \
  X(cuMemHostUnregister, 4000)            \
  X(cuIpcGetMemHandle, 4010)              \
  X(cuStreamCreate, 2000)                 \
  X(cuStreamDestroy, 4000)                \
  X(cuStreamSynchronize, 2000)

// X(name, version): null where the driver is without it, as the fake one is.
#define REFIT_TEST_CUDA_OPTIONAL_CALLS(X) X(cuLaunchHostFunc, 10000)

struct Driver {
#define REFIT_X(name, version) PFN_##name##_v##version name = nullptr;
  REFIT_TEST_CUDA_CALLS(REFIT_X)
  REFIT_TEST_CUDA_OPTIONAL_CALLS(REFIT_X)
#undef REFIT_X

  /// Ends the process where there is no driver: nothing here means anything then.
  static const Driver& get();
  /// Nothing if the driver is a real one.
  static const std::optional<fakecuda::Control>& fake();
};

/// Devices that this process sees.
int device_count();

/// Ends the process with the call's name unless it succeeded.
void must(CUresult code, const char* call);

/// The calling thread's current context, the device's primary one, until destroyed.
class Current {
 public:
  explicit Current(int device);
  ~Current();
  Current(const Current&) = delete;
  Current& operator=(const Current&) = delete;
};

/// Releases the contexts that Current retained, before the process ends.
void release_contexts();

}  // namespace refit::test::cuda

/// Ends a test that asks what only the fake driver tells or does. scripts/gpu-check counts it as
/// such.
#define REFIT_FAKE_ONLY(why) \
  if (!::refit::test::cuda::Driver::fake()) GTEST_SKIP() << "fake only: " << (why)
/// Ends a test that this host has too few devices for. scripts/gpu-check counts it as not run.
#define REFIT_NEEDS_DEVICES(count)                                          \
  if (const int seen = ::refit::test::cuda::device_count(); seen < (count)) \
  GTEST_SKIP() << "not run: needs " << (count) << " devices, and there is " << seen
