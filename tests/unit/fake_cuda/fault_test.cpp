// Injected failures of all kinds, and the tables that say what was called.

#include "unit/fake_cuda/fixture.hpp"

namespace fakecuda::test {
namespace {

class FakeFault : public FakeCuda {};

TEST_F(FakeFault, RefusedCallDoesNothing) {
  ASSERT_EQ(cuda().control.set_faults("cuMemAlloc#2=2"), 0);
  const CUdeviceptr first = allocate(16);
  CUdeviceptr second = 0;
  EXPECT_EQ(cuda().cuMemAlloc(&second, 16), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(cuda().control.gauge("allocations"), 1U);
  const CUdeviceptr third = allocate(16);
  MUST(cuda().cuMemFree(first));
  MUST(cuda().cuMemFree(third));
}

TEST_F(FakeFault, CallMayBeDoneAndFail) {
  const CUdeviceptr pointer = allocate(16);
  ASSERT_EQ(cuda().control.set_faults("cuMemFree=999:after"), 0);
  EXPECT_EQ(cuda().cuMemFree(pointer), CUDA_ERROR_UNKNOWN);
  EXPECT_EQ(cuda().control.gauge("allocations"), 0U);
  EXPECT_EQ(cuda().cuMemFree(pointer), CUDA_ERROR_INVALID_VALUE) << "its own failure is told";
  ASSERT_EQ(cuda().control.set_faults(""), 0);
}

// Goal: the k-th call of all is struck, for each k, and the count tells when there was none left.
TEST_F(FakeFault, EveryCallOfASequenceIsStruckInTurn) {
  // What must be done before the end is tried again; whoever frees after a failed wait frees under
  // the work.
  const auto sequence = [] {
    CUdeviceptr pointer = 0;
    CUstream stream = nullptr;
    CUresult first_failure = cuda().cuMemAlloc(&pointer, 16);
    if (first_failure != CUDA_SUCCESS) return first_failure;
    const auto insist = [&](auto&& call) {
      for (CUresult result = call(); result != CUDA_SUCCESS; result = call())
        first_failure = result;
    };
    first_failure = cuda().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING);
    if (first_failure == CUDA_SUCCESS) {
      first_failure = cuda().cuMemsetD8Async(pointer, 1, 16, stream);
      insist([&] { return cuda().cuStreamSynchronize(stream); });
      insist([&] { return cuda().cuStreamDestroy(stream); });
    }
    insist([&] { return cuda().cuMemFree(pointer); });
    return first_failure;
  };
  int k = 1;
  for (; k < 100; ++k) {
    const std::uint64_t struck = cuda().control.gauge("faults");
    ASSERT_EQ(cuda().control.set_faults(("#" + std::to_string(k) + "=999").c_str()), 0);
    const CUresult result = sequence();
    if (cuda().control.gauge("faults") == struck) {
      EXPECT_EQ(result, CUDA_SUCCESS);
      break;
    }
    EXPECT_EQ(result, CUDA_ERROR_UNKNOWN) << "k = " << k;
    ASSERT_EQ(cuda().control.set_faults(""), 0);
    cuda().control.recover();
  }
  EXPECT_EQ(k, 7);
  ASSERT_EQ(cuda().control.set_faults(""), 0);
}

// Goal: work that was accepted may turn out to have failed, and then the device is lost.
TEST_F(FakeFault, DeviceMayBeLostLater) {
  const CUstream stream = make_stream();
  const CUdeviceptr pointer = allocate(16);
  ASSERT_EQ(cuda().control.set_faults("cuMemsetD8Async#1=719:later"), 0);
  MUST(cuda().cuMemsetD8Async(pointer, 1, 16, stream));
  MUST(cuda().cuMemsetD8Async(pointer, 2, 16, stream));
  EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_ERROR_LAUNCH_FAILED);
  CUdeviceptr other = 0;
  EXPECT_EQ(cuda().cuMemAlloc(&other, 16), CUDA_ERROR_LAUNCH_FAILED);
  EXPECT_EQ(cuda().cuStreamQuery(stream), CUDA_ERROR_LAUNCH_FAILED);
  int value = 0;
  MUST(cuda().cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_COMPUTE_MODE, 0));
  cuda().control.recover();
  MUST(cuda().cuMemFree(pointer));
  MUST(cuda().cuStreamDestroy(stream));
}

TEST_F(FakeFault, UnreadableTextChangesNothing) {
  for (const char* text : {"cuMemAlloc", "cuMemAlloc=x", "#0=1", "=1", "cuMemAlloc=1:sometimes"})
    EXPECT_EQ(cuda().control.set_faults(text), -1) << text;
}

TEST_F(FakeFault, CallsAreCountedByNameAndSymbol) {
  const std::uint64_t all = cuda().control.calls(nullptr);
  const std::uint64_t by_name = cuda().control.calls("cuMemAlloc");
  const std::uint64_t by_symbol = cuda().control.calls("cuMemAlloc_v2");
  const CUdeviceptr pointer = allocate(16);
  MUST(cuda().cuMemFree(pointer));
  EXPECT_EQ(cuda().control.calls("cuMemAlloc"), by_name + 1);
  EXPECT_EQ(cuda().control.calls("cuMemAlloc_v2"), by_symbol + 1);
  EXPECT_EQ(cuda().control.calls(nullptr), all + 2);
  EXPECT_EQ(cuda().control.gauge("no such gauge"), ~std::uint64_t{0});
}

}  // namespace
}  // namespace fakecuda::test
