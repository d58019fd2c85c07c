// What is exported of a pointer, and what is said of one that cannot be.

#include "memory/cuda/export.hpp"

#include "unit/cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

class ExportTest : public CudaTest {
 protected:
  Result<Exported> exported(CUdeviceptr pointer, std::uint64_t bytes, bool same_process = false) {
    return export_memory(*devices_, pointer, bytes, "engine/transformer: region 3", same_process);
  }
};

TEST_F(ExportTest, AnAllocationIsExportedWholeWithThePointersOffset) {
  const MadeMemory made(Kind::allocation, 3 * kMiB, 1, 1);
  const auto whole = exported(made.address(), made.bytes());
  const auto inner = exported(made.address() + kMiB + 12, 100);
  ASSERT_TRUE(whole && inner);
  EXPECT_EQ(whole->kind, RegionKind::cuda_legacy);
  EXPECT_EQ(whole->device, devices_->all()[1].uuid);
  EXPECT_EQ(whole->offset, 0U);
  EXPECT_EQ(inner->offset, kMiB + 12);
  EXPECT_EQ(inner->bytes, 100U);
  ASSERT_EQ(inner->pieces.size(), 1U);
  EXPECT_EQ(inner->pieces[0].bytes, 3 * kMiB);
  EXPECT_EQ(inner->pieces[0].allocation_id, whole->pieces[0].allocation_id);
  EXPECT_FALSE(inner->pieces[0].fd);
}

TEST_F(ExportTest, ARangeOverSeveralSegmentsIsOneRegionOfSeveralPieces) {
  const MadeMemory made(Kind::segments, 2 * kMiB, 4);
  const std::size_t before = open_fds();
  {
    // Begins in the second segment and ends in the third.
    const auto region = exported(made.address() + 3 * kMiB, 2 * kMiB);
    ASSERT_TRUE(region) << region.error().to_string();
    EXPECT_EQ(region->kind, RegionKind::cuda_vmm);
    EXPECT_EQ(region->offset, kMiB);
    ASSERT_EQ(region->pieces.size(), 2U);
    EXPECT_NE(region->pieces[0].allocation_id, region->pieces[1].allocation_id);
    for (const DevicePiece& piece : region->pieces) {
      EXPECT_EQ(piece.bytes, 2 * kMiB);
      EXPECT_TRUE(piece.fd);
      EXPECT_EQ(::fcntl(piece.fd.get(), F_GETFD), FD_CLOEXEC);
    }
    const auto last_byte = exported(made.address() + 8 * kMiB - 1, 1);
    ASSERT_TRUE(last_byte);
    EXPECT_EQ(last_byte->offset, 2 * kMiB - 1);
    EXPECT_EQ(last_byte->pieces.size(), 1U);
  }
  EXPECT_EQ(open_fds(), before);
}

TEST_F(ExportTest, WhatCannotBeSharedIsRefusedWithWhatToDo) {
  const std::pair<Kind, const char*> cases[] = {
      {Kind::managed, "Allocate it with cudaMalloc"},
      {Kind::pool, "PYTORCH_CUDA_ALLOC_CONF=backend:native"},
      {Kind::segments_without_fd, "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1"},
      {Kind::pinned, "Take refit::SharedMemory"},
      {Kind::pageable, "is no CUDA memory"},
      {Kind::nothing, "is no CUDA memory"},
  };
  for (const auto& [kind, words] : cases) {
    const MadeMemory made(kind, 2 * kMiB, 2);
    const auto refused = exported(made.address() + 64, 100);
    EXPECT_TRUE(refuses(refused, Errc::bad_region, words));
    EXPECT_TRUE(refuses(refused, Errc::bad_region, "engine/transformer: region 3"));
  }
}

TEST_F(ExportTest, MemoryOfADeviceWithoutIpcIsRefused) {
  const ExporterProcess process(Environment{{"FAKECUDA_DEVICE_0", "ipc=0"}});
  EXPECT_TRUE(refuses(process.exported(Kind::allocation, kMiB, 1, 0, kMiB), Errc::bad_region,
                      "has no CUDA IPC"));
}

TEST_F(ExportTest, ARangeThatLeavesItsAllocationIsRefused) {
  const MadeMemory made(Kind::allocation, 3 * kMiB);
  EXPECT_TRUE(refuses(exported(made.address() + kMiB, 2 * kMiB + 1), Errc::bad_region,
                      "on only 2097152 lie in its allocation"));
  const MadeMemory segments(Kind::segments, 2 * kMiB, 2);
  EXPECT_TRUE(refuses(exported(segments.address(), 4 * kMiB + 1), Errc::bad_region,
                      "on only 4194304 lie in its allocation"));
  EXPECT_TRUE(refuses(exported(segments.address(), 0), Errc::bad_argument, "0 bytes"));
  EXPECT_TRUE(
      refuses(exported(segments.address(), ~std::uint64_t{0}), Errc::bad_argument, "pass the end"));
}

// Neighbours in one range of addresses, but not of one device.
TEST_F(ExportTest, SegmentsOfTwoDevicesAreNotOneRegion) {
  CUdeviceptr base = 0;
  must(cuda().cuMemAddressReserve(&base, 4 * kMiB, 0, 0, 0));
  for (const int device : {0, 1}) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location.type = CU_MEM_LOCATION_TYPE_DEVICE;
    properties.location.id = device;
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemGenericAllocationHandle handle = 0;
    must(cuda().cuMemCreate(&handle, 2 * kMiB, &properties, 0));
    must(cuda().cuMemMap(base + static_cast<unsigned int>(device) * 2 * kMiB, 2 * kMiB, 0, handle,
                         0));
    must(cuda().cuMemRelease(handle));
  }
  const auto second = exported(base + 2 * kMiB, 2 * kMiB);
  ASSERT_TRUE(second) << second.error().to_string();
  EXPECT_EQ(second->device, devices_->all()[1].uuid);
  EXPECT_TRUE(
      refuses(exported(base, 4 * kMiB), Errc::bad_region, "on only 2097152 lie in its allocation"));
  must(cuda().cuMemUnmap(base, 4 * kMiB));
  must(cuda().cuMemAddressFree(base, 4 * kMiB));
}

TEST_F(ExportTest, ForTheSameProcessAnyDeviceMemoryIsItsAddress) {
  for (const Kind kind :
       {Kind::allocation, Kind::segments, Kind::segments_without_fd, Kind::pool}) {
    const MadeMemory made(kind, 2 * kMiB);
    const auto region = exported(made.address() + 5, 100, /*same_process=*/true);
    ASSERT_TRUE(region) << region.error().to_string();
    EXPECT_EQ(region->kind, RegionKind::cuda_local);
    EXPECT_EQ(region->address, made.address() + 5);
    EXPECT_FALSE(region->pieces[0].fd);
  }
  const MadeMemory managed(Kind::managed, kMiB);
  EXPECT_TRUE(refuses(exported(managed.address(), 1, true), Errc::bad_region, "managed"));
}

// Other memory at an address that was exported has another id: an engine that reallocates without
// registering again is found out.
TEST_F(ExportTest, OtherMemoryAtTheSameAddressHasAnotherId) {
  configure({{"REUSE_ADDRESSES", "1"}});
  std::optional<MadeMemory> made(std::in_place, Kind::allocation, 2 * kMiB);
  const CUdeviceptr address = made->address();
  const auto before = exported(address, kMiB);
  ASSERT_TRUE(before);
  EXPECT_EQ(identify(devices_->driver(), address + 77, "it"), before->pieces[0].allocation_id);
  made.reset();
  EXPECT_TRUE(refuses(identify(devices_->driver(), address, "it"), Errc::bad_region, "was freed"));
  made.emplace(Kind::allocation, 2 * kMiB);
  ASSERT_EQ(made->address(), address);
  const auto id = identify(devices_->driver(), address, "it");
  ASSERT_TRUE(id);
  EXPECT_NE(*id, before->pieces[0].allocation_id);
}

// Every call of an export fails in turn; nothing is left, and the next one succeeds.
TEST_F(ExportTest, LeavesNothingWhenAnyCallFails) {
  const MadeMemory legacy(Kind::allocation, 4 * kMiB);
  const MadeMemory segments(Kind::segments, 2 * kMiB, 3);
  static_cast<void>(context());
  const std::uint64_t handles = held("allocation_handles");
  const std::size_t fds = open_fds();
  for (const CUdeviceptr address : {legacy.address(), segments.address()}) {
    const int failed =
        fail_each({"cuPointerGetAttribute", "cuCtxPushCurrent", "cuMemGetAddressRange",
                   "cuMemRetainAllocationHandle", "cuMemGetAllocationPropertiesFromHandle",
                   "cuMemExportToShareableHandle", "cuIpcGetMemHandle"},
                  [&] { return exported(address, 4 * kMiB).has_value(); });
    EXPECT_GT(failed, 6);
    EXPECT_EQ(held("allocation_handles"), handles);
    EXPECT_EQ(open_fds(), fds);
    EXPECT_TRUE(exported(address, 4 * kMiB));
  }
}

}  // namespace
}  // namespace refit::cuda::test
