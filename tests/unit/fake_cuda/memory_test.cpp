// Allocations, what a pointer is, pinned host memory.

#include <sys/mman.h>

#include "unit/fake_cuda/fixture.hpp"

namespace fakecuda::test {
namespace {

constexpr std::size_t kMemoryBytes = 3 * 4096 + 17;

class FakeMemory : public FakeCuda {
 protected:
  template <typename Value>
  static Value attribute(CUpointer_attribute which, CUdeviceptr pointer) {
    Value value{};
    EXPECT_EQ(cuda().cuPointerGetAttribute(&value, which, pointer), CUDA_SUCCESS) << which;
    return value;
  }
  static bool is_legacy(CUdeviceptr pointer) {
    return attribute<int>(CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE, pointer) != 0;
  }
};

TEST_F(FakeMemory, AllocationsAreFreshAndTold) {
  const CUdeviceptr pointer = allocate(kMemoryBytes);
  EXPECT_TRUE(device_is_all(pointer, kMemoryBytes, 0xfb)) << "uninitialised memory reads as zeros";
  CUdeviceptr base = 0;
  std::size_t bytes = 0;
  MUST(cuda().cuMemGetAddressRange(&base, &bytes, pointer + 100));
  EXPECT_EQ(base, pointer);
  EXPECT_EQ(bytes, kMemoryBytes);
  std::size_t free_bytes = 0;
  std::size_t total = 0;
  MUST(cuda().cuMemGetInfo(&free_bytes, &total));
  EXPECT_EQ(total - free_bytes, kMemoryBytes);
  CUdeviceptr too_large = 0;
  EXPECT_EQ(cuda().cuMemAlloc(&too_large, total), CUDA_ERROR_OUT_OF_MEMORY);
  EXPECT_EQ(cuda().cuMemAlloc(&too_large, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuda().cuMemFree(pointer + 1), CUDA_ERROR_INVALID_VALUE);
  MUST(cuda().cuMemFree(pointer));
  EXPECT_EQ(cuda().cuMemFree(pointer), CUDA_ERROR_INVALID_VALUE);
}

// Goal: a client can tell by the driver alone how a pointer may be shared.
TEST_F(FakeMemory, PointersAreToldApart) {
  const CUstream stream = make_stream();
  const CUdeviceptr legacy = allocate(kMemoryBytes);
  CUdeviceptr pool = 0;
  CUdeviceptr managed = 0;
  MUST(cuda().cuMemAllocAsync(&pool, kMemoryBytes, stream));
  MUST(cuda().cuMemAllocManaged(&managed, kMemoryBytes, CU_MEM_ATTACH_GLOBAL));
  {
    Pinned host(kMemoryBytes);
    EXPECT_EQ(attribute<unsigned>(CU_POINTER_ATTRIBUTE_MEMORY_TYPE, host.address()),
              CU_MEMORYTYPE_HOST);
    EXPECT_FALSE(is_legacy(host.address()));
  }
  EXPECT_TRUE(is_legacy(legacy + 5));
  EXPECT_FALSE(is_legacy(pool));
  EXPECT_FALSE(is_legacy(managed));
  EXPECT_EQ(attribute<unsigned>(CU_POINTER_ATTRIBUTE_IS_MANAGED, managed), 1U);
  EXPECT_EQ(attribute<unsigned>(CU_POINTER_ATTRIBUTE_IS_MANAGED, legacy), 0U);
  EXPECT_NE(attribute<CUmemoryPool>(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, pool), nullptr);
  EXPECT_EQ(attribute<CUmemoryPool>(CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE, legacy), nullptr);
  EXPECT_EQ(attribute<std::uint64_t>(CU_POINTER_ATTRIBUTE_ALLOWED_HANDLE_TYPES, pool), 0U);
  EXPECT_EQ(attribute<CUdeviceptr>(CU_POINTER_ATTRIBUTE_RANGE_START_ADDR, legacy + 9), legacy);
  EXPECT_EQ(attribute<std::size_t>(CU_POINTER_ATTRIBUTE_RANGE_SIZE, legacy + 9), kMemoryBytes);
  EXPECT_EQ(attribute<int>(CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL, legacy), 0);
  EXPECT_EQ(attribute<CUcontext>(CU_POINTER_ATTRIBUTE_CONTEXT, legacy), contexts_[0]);
  CUipcMemHandle handle{};
  EXPECT_EQ(cuda().cuIpcGetMemHandle(&handle, pool), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuda().cuIpcGetMemHandle(&handle, managed), CUDA_ERROR_INVALID_VALUE);

  // Several at once: of a stranger zeros, where one at a time fails.
  CUpointer_attribute wanted[] = {CU_POINTER_ATTRIBUTE_MEMORY_TYPE, CU_POINTER_ATTRIBUTE_BUFFER_ID};
  unsigned int type = 77;
  std::uint64_t id = 77;
  void* places[] = {&type, &id};
  MUST(cuda().cuPointerGetAttributes(2, wanted, places, legacy));
  EXPECT_EQ(type, static_cast<unsigned>(CU_MEMORYTYPE_DEVICE));
  EXPECT_EQ(id, attribute<std::uint64_t>(CU_POINTER_ATTRIBUTE_BUFFER_ID, legacy));
  MUST(cuda().cuPointerGetAttributes(2, wanted, places, reinterpret_cast<CUdeviceptr>(&id)));
  EXPECT_EQ(type, 0U);
  EXPECT_EQ(cuda().cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE,
                                         reinterpret_cast<CUdeviceptr>(&id)),
            CUDA_ERROR_INVALID_VALUE);

  MUST(cuda().cuMemFreeAsync(pool, stream));
  MUST(cuda().cuStreamSynchronize(stream));
  EXPECT_NE(cuda().cuMemFree(pool), CUDA_SUCCESS) << "it was freed in the stream's order";
  MUST(cuda().cuMemFree(managed));
  MUST(cuda().cuMemFree(legacy));
  MUST(cuda().cuStreamDestroy(stream));
}

// Goal: an address comes back only on request, and then with another id.
TEST_F(FakeMemory, AddressesAreReusedOnRequest) {
  for (const bool reuse : {false, true}) {
    configure({{"REUSE_ADDRESSES", reuse ? "1" : "0"}});
    const CUdeviceptr first = allocate(kMemoryBytes);
    const auto id = attribute<std::uint64_t>(CU_POINTER_ATTRIBUTE_BUFFER_ID, first);
    MUST(cuda().cuMemFree(first));
    const CUdeviceptr second = allocate(kMemoryBytes);
    EXPECT_EQ(first == second, reuse);
    EXPECT_NE(attribute<std::uint64_t>(CU_POINTER_ATTRIBUTE_BUFFER_ID, second), id);
    EXPECT_TRUE(device_is_all(second, kMemoryBytes, 0xfb));
    MUST(cuda().cuMemFree(second));
  }
}

TEST_F(FakeMemory, TenThousandAllocationsLeaveNothing) {
  const auto count = [](const char* folder) {
    return std::distance(std::filesystem::directory_iterator(folder), {});
  };
  const auto files = count(directory().c_str());
  const auto fds = count("/proc/self/fd");
  for (int i = 0; i < 10'000; ++i) MUST(cuda().cuMemFree(allocate(4096)));
  EXPECT_EQ(count(directory().c_str()), files);
  EXPECT_EQ(count("/proc/self/fd"), fds);
}

// Goal: freeing does not wait for the work on it, and work on what was freed loses the device: from
// then on everything fails.
TEST_F(FakeMemory, FreeWithPendingWorkLosesTheDevice) {
  const CUstream stream = make_stream();
  const CUdeviceptr pointer = allocate(kMemoryBytes);
  const CUdeviceptr other = allocate(kMemoryBytes);
  MUST(cuda().cuMemsetD8Async(pointer, 1, 10, stream));
  MUST(cuda().cuMemFree(pointer));
  EXPECT_TRUE(violated("while work on it is pending"));
  EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_TRUE(violated("was freed"));
  EXPECT_EQ(cuda().cuMemFree(other), CUDA_ERROR_ILLEGAL_ADDRESS);
  EXPECT_EQ(cuda().cuStreamDestroy(stream), CUDA_ERROR_ILLEGAL_ADDRESS);
  cuda().control.recover();
  MUST(cuda().cuMemFree(other));
  MUST(cuda().cuStreamDestroy(stream));
}

TEST_F(FakeMemory, RegistrationIsCheckedAsTheDriverDoes) {
  constexpr std::size_t kPages = 4 * 4096;
  configure({{"HOST_REGISTER_MAX", "20K"}});
  const auto map = [](std::size_t bytes, int rights) {
    return static_cast<unsigned char*>(
        ::mmap(nullptr, bytes, rights, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  };
  unsigned char* memory = map(5 * 4096, PROT_READ | PROT_WRITE);
  EXPECT_EQ(cuda().cuMemHostRegister(memory, 0, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_NE(cuda().cuMemHostRegister(memory, 5 * 4096, 0), CUDA_SUCCESS)
      << "the limit for one call";
  MUST(cuda().cuMemHostRegister(memory, kPages, 0));
  EXPECT_EQ(cuda().control.gauge("pinned_bytes"), kPages);
  EXPECT_EQ(cuda().cuMemHostRegister(memory + 4096, 4096, 0),
            CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED);
  CUdeviceptr pointer = 0;
  MUST(cuda().cuMemHostGetDevicePointer(&pointer, memory, 0));

  const CUstream stream = make_stream();
  MUST(cuda().cuMemsetD8Async(pointer, 1, kPages, stream));
  MUST(cuda().cuMemHostUnregister(memory));
  EXPECT_TRUE(violated("while work on it is pending"));
  MUST(cuda().cuMemHostRegister(memory, kPages, 0));
  MUST(cuda().cuStreamSynchronize(stream));
  MUST(cuda().cuStreamDestroy(stream));
  MUST(cuda().cuMemHostUnregister(memory));
  EXPECT_NE(cuda().cuMemHostUnregister(memory), CUDA_SUCCESS);

  ::munmap(memory + 4096, 4096);
  EXPECT_EQ(cuda().cuMemHostRegister(memory, kPages, 0), CUDA_ERROR_INVALID_VALUE)
      << "a hole in it";
  ::munmap(memory, 5 * 4096);

  unsigned char* constant = map(kPages, PROT_READ);
  EXPECT_NE(cuda().cuMemHostRegister(constant, kPages, 0), CUDA_SUCCESS);
  MUST(cuda().cuMemHostRegister(constant, kPages, CU_MEMHOSTREGISTER_READ_ONLY));
  const CUstream writer = make_stream();
  EXPECT_NE(cuda().cuMemsetD8Async(reinterpret_cast<CUdeviceptr>(constant), 1, 1, writer),
            CUDA_SUCCESS);
  EXPECT_TRUE(violated("READ_ONLY"));
  MUST(cuda().cuStreamDestroy(writer));
  MUST(cuda().cuMemHostUnregister(constant));
  ::munmap(constant, kPages);
}

}  // namespace
}  // namespace fakecuda::test
