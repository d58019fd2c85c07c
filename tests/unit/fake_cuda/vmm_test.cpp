// Physical memory, reservations and mappings.

#include <fcntl.h>
#include <unistd.h>

#include "unit/fake_cuda/fixture.hpp"

namespace fakecuda::test {
namespace {

class FakeVmm : public FakeCuda {
 protected:
  static CUmemAllocationProp properties(
      CUmemAllocationHandleType type = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    CUmemAllocationProp made{};
    made.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    made.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    made.requestedHandleTypes = type;
    return made;
  }
  static CUmemGenericAllocationHandle create(
      CUmemAllocationHandleType type = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR) {
    const CUmemAllocationProp wanted = properties(type);
    CUmemGenericAllocationHandle handle = 0;
    EXPECT_EQ(cuda().cuMemCreate(&handle, kUnit, &wanted, 0), CUDA_SUCCESS);
    return handle;
  }
  static CUdeviceptr reserve(std::size_t units) {
    CUdeviceptr pointer = 0;
    EXPECT_EQ(cuda().cuMemAddressReserve(&pointer, units * kUnit, 0, 0, 0), CUDA_SUCCESS);
    return pointer;
  }
  static CUresult allow(CUdeviceptr pointer, std::size_t units, CUmemAccess_flags flags) {
    const CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, flags};
    return cuda().cuMemSetAccess(pointer, units * kUnit, &access, 1);
  }
  static constexpr std::size_t kUnit = std::size_t{2} << 20;
};

// Goal: two segments of one reservation, as an allocator with expandable segments makes them, are
// one piece to a copy and two to cuMemGetAddressRange.
TEST_F(FakeVmm, SegmentsOfOneReservation) {
  const CUdeviceptr base = reserve(3);
  for (std::size_t i = 0; i < 2; ++i) {
    const CUmemGenericAllocationHandle handle = create();
    MUST(cuda().cuMemMap(base + i * kUnit, kUnit, 0, handle, 0));
    MUST(cuda().cuMemRelease(handle));
  }
  const CUstream stream = make_stream();
  EXPECT_NE(cuda().cuMemsetD8Async(base, 1, 1, stream), CUDA_SUCCESS);
  EXPECT_TRUE(violated("gave no access"));
  EXPECT_EQ(allow(base, 3, CU_MEM_ACCESS_FLAGS_PROT_READWRITE), CUDA_ERROR_INVALID_VALUE)
      << "the third segment is not mapped";
  MUST(allow(base, 2, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
  MUST(cuda().cuMemsetD8Async(base + kUnit - 5, 9, 10, stream));
  MUST(cuda().cuStreamSynchronize(stream));
  EXPECT_TRUE(device_is_all(base + kUnit - 5, 10, 9));
  CUdeviceptr segment = 0;
  std::size_t bytes = 0;
  MUST(cuda().cuMemGetAddressRange(&segment, &bytes, base + kUnit + 1));
  EXPECT_EQ(segment, base + kUnit);
  EXPECT_EQ(bytes, kUnit);
  std::size_t whole = 0;
  MUST(cuda().cuPointerGetAttribute(&whole, CU_POINTER_ATTRIBUTE_RANGE_SIZE, base));
  EXPECT_EQ(whole, 3 * kUnit);

  MUST(allow(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READ));
  EXPECT_NE(cuda().cuMemsetD8Async(base, 1, 1, stream), CUDA_SUCCESS);
  EXPECT_TRUE(violated("PROT_READ"));
  CUmemLocation location{CU_MEM_LOCATION_TYPE_DEVICE, 0};
  unsigned long long flags = 0;
  MUST(cuda().cuMemGetAccess(&flags, &location, base));
  EXPECT_EQ(flags, static_cast<unsigned>(CU_MEM_ACCESS_FLAGS_PROT_READ));

  MUST(cuda().cuMemsetD8Async(base + kUnit, 1, 1, stream));
  EXPECT_EQ(cuda().cuMemUnmap(base, kUnit / 2), CUDA_ERROR_INVALID_VALUE);
  EXPECT_NE(cuda().cuMemAddressFree(base, 3 * kUnit), CUDA_SUCCESS) << "something is mapped";
  MUST(cuda().cuStreamSynchronize(stream));
  MUST(cuda().cuMemsetD8Async(base + kUnit, 1, 1, stream));
  MUST(cuda().cuMemUnmap(base, kUnit));
  MUST(cuda().cuMemUnmap(base + kUnit, kUnit));
  EXPECT_TRUE(violated("while work on it is pending"));
  cuda().control.recover();
  EXPECT_NE(cuda().cuMemAddressFree(base, kUnit), CUDA_SUCCESS);
  MUST(cuda().cuMemAddressFree(base, 3 * kUnit));
  MUST(cuda().cuStreamDestroy(stream));
}

TEST_F(FakeVmm, SizesAndStatesAreChecked) {
  std::size_t granularity = 0;
  const CUmemAllocationProp wanted = properties();
  MUST(cuda().cuMemGetAllocationGranularity(&granularity, &wanted,
                                            CU_MEM_ALLOC_GRANULARITY_MINIMUM));
  EXPECT_EQ(granularity, kUnit);
  CUmemGenericAllocationHandle handle = 0;
  EXPECT_EQ(cuda().cuMemCreate(&handle, kUnit + 1, &wanted, 0), CUDA_ERROR_INVALID_VALUE);
  const CUdeviceptr base = reserve(2);
  handle = create();
  EXPECT_EQ(cuda().cuMemMap(base, 2 * kUnit, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuda().cuMemMap(base + 4096, kUnit, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(cuda().cuMemMap(base + 2 * kUnit, kUnit, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);
  MUST(cuda().cuMemMap(base, kUnit, 0, handle, 0));
  EXPECT_EQ(cuda().cuMemMap(base, kUnit, 0, handle, 0), CUDA_ERROR_INVALID_VALUE);

  // Released and still mapped: retaining gives the same handle back.
  MUST(cuda().cuMemRelease(handle));
  EXPECT_EQ(cuda().cuMemRelease(handle), CUDA_ERROR_INVALID_VALUE);
  CUmemGenericAllocationHandle retained = 0;
  MUST(cuda().cuMemRetainAllocationHandle(&retained, reinterpret_cast<void*>(base + 77)));
  EXPECT_EQ(retained, handle);
  EXPECT_EQ(cuda().control.gauge("allocation_handles"), 1U);
  MUST(cuda().cuMemRelease(retained));

  const CUstream stream = make_stream();
  MUST(allow(base, 1, CU_MEM_ACCESS_FLAGS_PROT_READWRITE));
  MUST(cuda().cuMemsetD8Async(base, 1, 1, stream));
  MUST(cuda().cuStreamSynchronize(stream));
  MUST(cuda().cuMemUnmap(base, kUnit));
  MUST(cuda().cuMemAddressFree(base, 2 * kUnit));
  MUST(cuda().cuStreamDestroy(stream));
}

// Goal: only an fd that the driver made is memory, and only memory made for it gets one.
TEST_F(FakeVmm, ExportAndImport) {
  CUmemGenericAllocationHandle handle = create(CU_MEM_HANDLE_TYPE_NONE);
  int fd = -1;
  EXPECT_NE(
      cuda().cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
      CUDA_SUCCESS);
  MUST(cuda().cuMemRelease(handle));
  handle = create();
  MUST(cuda().cuMemExportToShareableHandle(&fd, handle, CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR,
                                           0));
  MUST(cuda().cuMemRelease(handle));
  EXPECT_NE(::ftruncate(fd, 0), 0) << "who holds the fd cannot shrink the memory";
  const auto import = [](int from, CUmemGenericAllocationHandle& to) {
    return cuda().cuMemImportFromShareableHandle(
        &to, reinterpret_cast<void*>(static_cast<std::intptr_t>(from)),
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
  };
  CUmemGenericAllocationHandle imported = 0;
  MUST(import(fd, imported));
  ::close(fd);
  CUmemAllocationProp found{};
  MUST(cuda().cuMemGetAllocationPropertiesFromHandle(&found, imported));
  EXPECT_EQ(found.location.id, 0);
  MUST(cuda().cuMemRelease(imported));

  const int plain = ::memfd_create("plain", MFD_CLOEXEC);
  for (const off_t bytes : {0, 4096, 8192, 12345}) {
    ASSERT_EQ(::ftruncate(plain, bytes), 0);
    EXPECT_NE(import(plain, imported), CUDA_SUCCESS);
  }
  ::close(plain);
  EXPECT_NE(import(-1, imported), CUDA_SUCCESS);
  int pipe_ends[2];
  ASSERT_EQ(::pipe(pipe_ends), 0);
  EXPECT_NE(import(pipe_ends[0], imported), CUDA_SUCCESS);
  for (const int end : pipe_ends) ::close(end);
}

}  // namespace
}  // namespace fakecuda::test
