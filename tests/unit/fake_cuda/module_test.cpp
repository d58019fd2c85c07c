// Modules, kernels and launches.

#include "unit/fake_cuda/fatbin.hpp"
#include "unit/fake_cuda/fixture.hpp"
#include "unit/fake_cuda/peer.hpp"

namespace fakecuda::test {
namespace {

constexpr std::size_t kKernelBytes = 1000;

/// to[i] = from[i] + addend for the first count bytes.
void run_add(const FakeCudaLaunch* launch) {
  const auto to = *static_cast<const CUdeviceptr*>(launch->parameters[0]);
  const auto from = *static_cast<const CUdeviceptr*>(launch->parameters[1]);
  const auto count = *static_cast<const std::uint32_t*>(launch->parameters[2]);
  const auto addend = *static_cast<const unsigned char*>(launch->parameters[3]);
  auto* output = static_cast<unsigned char*>(launch->bytes(to, count, 1));
  const auto* input = static_cast<const unsigned char*>(launch->bytes(from, count, 0));
  if (output == nullptr || input == nullptr) return;
  for (std::uint32_t i = 0; i < count; ++i)
    output[i] = static_cast<unsigned char>(input[i] + addend);
}

class FakeModule : public FakeCuda {
 protected:
  void SetUp() override {
    FakeCuda::SetUp();
    static const std::size_t kParameterBytes[] = {8, 8, 4, 1};
    static const FakeCudaKernel kAdd{"fake_add", kParameterBytes, 4, &run_add, nullptr};
    static const bool kRegistered = (cuda().control.register_kernel(&kAdd), true);
    ASSERT_TRUE(kRegistered);
  }
};

TEST_F(FakeModule, ImageMustFitTheDevice) {
  struct Case {
    std::vector<std::uint32_t> architectures;
    bool ptx;
    CUresult result;
  };
  for (const Case& c :
       {Case{{80, 90}, false, CUDA_SUCCESS}, Case{{80}, false, CUDA_ERROR_NO_BINARY_FOR_GPU},
        Case{{100}, false, CUDA_ERROR_NO_BINARY_FOR_GPU}, Case{{80}, true, CUDA_SUCCESS},
        Case{{100}, true, CUDA_ERROR_NO_BINARY_FOR_GPU}}) {
    const std::vector<char> image = make_fatbin(c.architectures, c.ptx);
    CUmodule module = nullptr;
    EXPECT_EQ(cuda().cuModuleLoadData(&module, image.data()), c.result);
    EXPECT_EQ(cuda().cuModuleUnload(module),
              c.result == CUDA_SUCCESS ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE);
  }
  std::vector<char> broken = make_fatbin({90});
  broken[0] = 'x';
  CUmodule module = nullptr;
  EXPECT_EQ(cuda().cuModuleLoadData(&module, broken.data()), CUDA_ERROR_INVALID_IMAGE);
}

// Goal: a kernel gets the values of its parameters at the launch, runs in its stream's order, and
// loses the device if it touches what it may not.
TEST_F(FakeModule, KernelRunsInOrderAndInBounds) {
  const std::vector<char> image = make_fatbin({90});
  CUmodule module = nullptr;
  MUST(cuda().cuModuleLoadData(&module, image.data()));
  CUfunction function = nullptr;
  EXPECT_EQ(cuda().cuModuleGetFunction(&function, module, "no_such"), CUDA_ERROR_NOT_FOUND);
  EXPECT_EQ(violations(), "");
  EXPECT_EQ(cuda().cuModuleGetFunction(&function, module, "fake_missing"), CUDA_ERROR_NOT_FOUND);
  EXPECT_TRUE(violated("no FakeCudaKernel"));
  MUST(cuda().cuModuleGetFunction(&function, module, "fake_add"));

  const CUstream stream = make_stream();
  CUdeviceptr to = allocate(kKernelBytes);
  CUdeviceptr from = allocate(kKernelBytes);
  std::uint32_t count = kKernelBytes;
  unsigned char addend = 3;
  void* parameters[] = {&to, &from, &count, &addend};
  const auto launch = [&] {
    return cuda().cuLaunchKernel(function, 4, 1, 1, 256, 1, 1, 0, stream, parameters, nullptr);
  };
  MUST(cuda().cuMemsetD8Async(from, 4, kKernelBytes, stream));
  MUST(launch());
  addend = 100;
  MUST(cuda().cuStreamSynchronize(stream));
  EXPECT_TRUE(device_is_all(to, kKernelBytes, 7));
  EXPECT_EQ(cuda().cuLaunchKernel(function, 4, 1, 1, 2048, 1, 1, 0, stream, parameters, nullptr),
            CUDA_ERROR_INVALID_VALUE);

  count = kKernelBytes + 1;
  MUST(launch());
  EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_TRUE(violated("past the end"));
  cuda().control.recover();

  // Of the other device it needs peer access, where a copy does not.
  MUST(cuda().cuMemFree(from));
  MUST(cuda().cuCtxPushCurrent(contexts_[1]));
  from = allocate(kKernelBytes);
  MUST(cuda().cuCtxPopCurrent(nullptr));
  count = kKernelBytes;
  MUST(launch());
  EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_TRUE(violated("peer access"));
  cuda().control.recover();
  MUST(cuda().cuMemcpyAsync(to, from, kKernelBytes, stream));
  MUST(cuda().cuStreamSynchronize(stream));
  MUST(cuda().cuCtxEnablePeerAccess(contexts_[1], 0));
  MUST(launch());
  MUST(cuda().cuStreamSynchronize(stream));
  EXPECT_TRUE(device_is_all(to, kKernelBytes, static_cast<unsigned char>(0xfb + addend)));
  MUST(cuda().cuMemFree(to));
  MUST(cuda().cuMemFree(from));
  MUST(cuda().cuStreamDestroy(stream));
  MUST(cuda().cuModuleUnload(module));
  EXPECT_EQ(launch(), CUDA_ERROR_INVALID_HANDLE);
}

TEST_F(FakeModule, LibraryGivesKernelsToAProgramThatKnowsOfNone) {
  const int with = run_peer_program({"kernel"}, {{"FAKECUDA_KERNELS", FAKE_CUDA_KERNELS_PATH}});
  EXPECT_TRUE(WIFEXITED(with) && WEXITSTATUS(with) == 0);
  const int without = run_peer_program({"kernel"});
  EXPECT_TRUE(WIFEXITED(without) && WEXITSTATUS(without) == 1);
}

}  // namespace
}  // namespace fakecuda::test
