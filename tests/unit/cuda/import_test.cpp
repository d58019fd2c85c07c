// Memory of another process, opened by what that process says of it: true, false and hostile.

#include "memory/cuda/import.hpp"

#include <array>
#include <thread>

#include "memory/cuda/export.hpp"
#include "unit/cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

class ImporterTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    sut_.emplace(devices_, false);
  }
  void TearDown() override {
    EXPECT_EQ(sut_->open_allocations(), 0U);
    sut_.reset();
    CudaTest::TearDown();
  }
  Result<std::shared_ptr<const DeviceMemory>> open(const ExporterProcess& process,
                                                   const Exported& exported,
                                                   Access access = Access::read_only,
                                                   std::uint64_t session = 1) {
    return sut_->open({session, process.pid(), ::geteuid()}, exported, access,
                      "trainer/x: region 0");
  }
  /// Refused as a bad region, in words that name region and problem, with nothing left open.
  void expect_refused(const ExporterProcess& process, const Exported& exported,
                      const std::string& words) {
    const auto refused = open(process, exported);
    EXPECT_TRUE(refuses(refused, Errc::bad_region, words));
    EXPECT_TRUE(refuses(refused, Errc::bad_region, "trainer/x: region 0: "));
    EXPECT_EQ(sut_->open_allocations(), 0U);
    expect_nothing_held();
  }
  static Exported copy_of(const Exported& exported) {
    Exported copy;
    copy.device = exported.device;
    copy.kind = exported.kind;
    copy.bytes = exported.bytes;
    copy.offset = exported.offset;
    copy.address = exported.address;
    for (const DevicePiece& piece : exported.pieces) {
      DevicePiece& other = copy.pieces.emplace_back();
      other.handle = piece.handle;
      other.bytes = piece.bytes;
      other.allocation_id = piece.allocation_id;
      if (piece.fd) other.fd = UniqueFd::adopt(::fcntl(piece.fd.get(), F_DUPFD_CLOEXEC, 0));
    }
    return copy;
  }

  std::optional<Importer> sut_;
};

// ---- what is true

TEST_F(ImporterTest, ARegionOfALegacyAllocationIsItsBytes) {
  ExporterProcess process;
  const auto exported = process.exported(Kind::allocation, 3 * kMiB, 1, kMiB + 12, kMiB);
  ASSERT_TRUE(exported) << exported.error().to_string();
  {
    const auto memory = open(process, *exported);
    ASSERT_TRUE(memory) << memory.error().to_string();
    EXPECT_EQ((*memory)->bytes, kMiB);
    EXPECT_EQ((*memory)->kind, RegionKind::cuda_legacy);
    EXPECT_EQ((*memory)->allocation_id, exported->pieces[0].allocation_id);
    EXPECT_EQ((*memory)->context->device().uuid, exported->device);
    EXPECT_TRUE(holds_pattern((*memory)->address, kMiB, kMiB + 12));
    EXPECT_EQ(held("imports"), 1U);
  }
  expect_nothing_held();
  EXPECT_EQ(process.end(), 0);
}

TEST_F(ImporterTest, ARegionOfSeveralSegmentsIsOneRange) {
  ExporterProcess process;
  const auto exported = process.exported(Kind::segments, 2 * kMiB, 3, kMiB, 4 * kMiB);
  ASSERT_TRUE(exported) << exported.error().to_string();
  {
    const auto memory = open(process, *exported);
    ASSERT_TRUE(memory) << memory.error().to_string();
    EXPECT_EQ((*memory)->kind, RegionKind::cuda_vmm);
    EXPECT_EQ(held("mappings"), 3U);
    EXPECT_EQ(held("reservations"), 1U);
    EXPECT_TRUE(holds_pattern((*memory)->address, 4 * kMiB, kMiB));
  }
  expect_nothing_held();
  EXPECT_EQ(process.end(), 0);
}

// By the driver's word and not only ours: read only is what the mapping allows.
TEST_F(ImporterTest, SegmentsAreMappedForWhatTheyAreOpenedFor) {
  const ExporterProcess process;
  const auto exported = process.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(exported);
  for (const auto& [access, flags] :
       {std::pair(Access::read_only, CU_MEM_ACCESS_FLAGS_PROT_READ),
        std::pair(Access::read_write, CU_MEM_ACCESS_FLAGS_PROT_READWRITE)}) {
    const auto memory = open(process, *exported, access);
    ASSERT_TRUE(memory) << memory.error().to_string();
    EXPECT_EQ((*memory)->access, access);
    for (const Device& device : devices_->all()) {
      const CUmemLocation location{CU_MEM_LOCATION_TYPE_DEVICE, device.ordinal};
      unsigned long long granted = 0;
      must(cuda().cuMemGetAccess(&granted, &location, (*memory)->address + 3 * kMiB));
      EXPECT_EQ(granted, static_cast<unsigned long long>(flags)) << device.ordinal;
    }
  }
}

TEST_F(ImporterTest, WhatIsWrittenArrivesInTheOtherProcess) {
  const ExporterProcess process;
  for (const Kind kind : {Kind::allocation, Kind::segments}) {
    const auto exported = process.exported(kind, 2 * kMiB, 1, 100, kMiB);
    ASSERT_TRUE(exported);
    const auto memory = open(process, *exported, Access::read_write);
    ASSERT_TRUE(memory) << memory.error().to_string();
    const auto current = Current::enter(*(*memory)->context);
    const unsigned char byte = 0xa5;
    must(cuda().cuMemcpyHtoD((*memory)->address + 3, &byte, 1));
    EXPECT_EQ(process.ask({.act = Act::read, .offset = 103}).value, 0xa5U);
  }
}

TEST_F(ImporterTest, RegionsOfOneAllocationOpenItOnce) {
  ExporterProcess process;
  const auto first = process.exported(Kind::allocation, 3 * kMiB, 1, 0, kMiB);
  const auto second = process.exported_again(2 * kMiB, kMiB);
  ASSERT_TRUE(first && second);
  const std::uint64_t opened = calls("cuIpcOpenMemHandle");
  const std::uint64_t closed = calls("cuIpcCloseMemHandle");
  auto one = open(process, *first);
  auto two = open(process, *second);
  ASSERT_TRUE(one && two);
  EXPECT_EQ(calls("cuIpcOpenMemHandle"), opened + 1);
  EXPECT_EQ((*two)->address, (*one)->address + 2 * kMiB);
  EXPECT_EQ(sut_->open_allocations(), 1U);
  one->reset();
  EXPECT_EQ(calls("cuIpcCloseMemHandle"), closed);
  EXPECT_TRUE(holds_pattern((*two)->address, kMiB, 2 * kMiB));
  two->reset();
  EXPECT_EQ(calls("cuIpcCloseMemHandle"), closed + 1);
  EXPECT_EQ(held("imports"), 0U);
  const auto again = open(process, *first);
  ASSERT_TRUE(again);
  EXPECT_TRUE(holds_pattern((*again)->address, kMiB, 0));
}

// Trainer and engine of one process are two sessions: neither's end closes what the other has.
TEST_F(ImporterTest, TwoSessionsOfOneProcessDoNotCloseEachOthersMemory) {
  ExporterProcess process;
  const auto exported = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(exported);
  auto one = open(process, *exported, Access::read_only, 1);
  auto two = open(process, *exported, Access::read_only, 2);
  ASSERT_TRUE(one && two);
  one->reset();
  EXPECT_TRUE(holds_pattern((*two)->address, kMiB, 0));
}

TEST_F(ImporterTest, AnIdOfAnotherSessionIsAnotherAllocation) {
  const ExporterProcess process;
  const ExporterProcess other;
  const auto mine = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  auto theirs = other.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(mine && theirs);
  theirs->pieces[0].allocation_id = mine->pieces[0].allocation_id;
  const auto one = open(process, *mine, Access::read_only, 1);
  const auto two = open(other, *theirs, Access::read_only, 2);
  ASSERT_TRUE(one && two);
  EXPECT_NE((*one)->address, (*two)->address);
}

TEST_F(ImporterTest, MemoryByFdOutlivesItsProcess) {
  ExporterProcess process;
  const auto exported = process.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(exported);
  const auto memory = open(process, *exported);
  ASSERT_TRUE(memory);
  process.kill_now();
  EXPECT_TRUE(holds_pattern((*memory)->address, 4 * kMiB, 0));
}

TEST_F(ImporterTest, TheFdsStayTheCallers) {
  const ExporterProcess process;
  auto exported = process.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(exported);
  const auto memory = open(process, *exported);
  ASSERT_TRUE(memory);
  EXPECT_EQ(::fcntl(exported->pieces[0].fd.get(), F_GETFD), FD_CLOEXEC);
  exported->pieces.clear();
  EXPECT_TRUE(holds_pattern((*memory)->address, 4 * kMiB, 0));
}

TEST_F(ImporterTest, MemoryOfThisProcessIsItsAddress) {
  const Exporter self{1, ::getpid(), ::geteuid()};
  std::optional<MadeMemory> made(std::in_place, Kind::segments, 2 * kMiB, 2);
  const auto exported = export_memory(*devices_, made->address() + 8, 3 * kMiB, "own", true);
  ASSERT_TRUE(exported);
  {
    const auto memory = sut_->open(self, *exported, Access::read_write, "own");
    ASSERT_TRUE(memory) << memory.error().to_string();
    EXPECT_EQ((*memory)->address, made->address() + 8);
    EXPECT_EQ((*memory)->bytes, 3 * kMiB);
    EXPECT_TRUE(holds_pattern((*memory)->address, 3 * kMiB, 8));
  }
  Exported beyond = copy_of(*exported);
  beyond.address += 2 * kMiB;
  EXPECT_TRUE(refuses(sut_->open(self, beyond, Access::read_only, "own"), Errc::bad_region,
                      "lie in its allocation"));
  Exported other_device = copy_of(*exported);
  other_device.device = devices_->all()[1].uuid;
  EXPECT_TRUE(refuses(sut_->open(self, other_device, Access::read_only, "own"), Errc::bad_region,
                      "its address is on device"));
  Exported stale = copy_of(*exported);
  stale.pieces[0].allocation_id += 1000;
  EXPECT_TRUE(refuses(sut_->open(self, stale, Access::read_only, "own"), Errc::bad_region,
                      "was freed since"));
  // Any other process could name any address of this one.
  EXPECT_TRUE(
      refuses(sut_->open({1, ::getpid() + 1, ::geteuid()}, *exported, Access::read_only, "own"),
              Errc::bad_region, "only taken from this very process"));
  made.reset();
  EXPECT_TRUE(refuses(sut_->open(self, *exported, Access::read_only, "own"), Errc::bad_region,
                      "is no CUDA memory"));
}

TEST_F(ImporterTest, AHandleOfThisProcessSaysHowToExportInstead) {
  const MadeMemory made(Kind::allocation, kMiB);
  const auto exported = export_memory(*devices_, made.address(), kMiB, "own");
  ASSERT_TRUE(exported);
  EXPECT_TRUE(refuses(sut_->open({1, ::getpid(), ::geteuid()}, *exported, Access::read_only, "own"),
                      Errc::bad_region, "export for the same process"));
}

// ---- what a client may say

TEST_F(ImporterTest, RangesOutsideOfTheirAllocationAreRefused) {
  constexpr std::uint64_t kMost = ~std::uint64_t{0};
  const ExporterProcess process;
  for (const Kind kind : {Kind::allocation, Kind::segments}) {
    const auto true_one = process.exported(kind, 2 * kMiB, 1, 0, 2 * kMiB);
    ASSERT_TRUE(true_one);
    const auto with = [&](std::uint64_t offset, std::uint64_t bytes) {
      Exported lie = copy_of(*true_one);
      lie.offset = offset;
      lie.bytes = bytes;
      return lie;
    };
    expect_refused(process, with(0, 0), "0 bytes");
    expect_refused(process, with(0, 2 * kMiB + 1), "leave its allocation");
    expect_refused(process, with(1, 2 * kMiB), "leave its allocation");
    expect_refused(process, with(2 * kMiB, 1), "it begins 2097152 bytes into");
    expect_refused(process, with(kMost, 1), "it begins");
    expect_refused(process, with(kMost, kMost), "it begins");
    expect_refused(process, with(kMiB, kMost), "leave its allocation");
    expect_refused(process, with(1, kMost), "leave its allocation");
  }
}

TEST_F(ImporterTest, AllocationsOfOtherSizesThanDeclaredAreRefused) {
  constexpr std::uint64_t kMost = ~std::uint64_t{0};
  const ExporterProcess process;
  const auto legacy = process.exported(Kind::allocation, 2 * kMiB, 1, 0, 2 * kMiB);
  ASSERT_TRUE(legacy);
  Exported lie = copy_of(*legacy);
  lie.pieces[0].bytes = 4 * kMiB;
  lie.bytes = 2 * kMiB + 1;
  expect_refused(process, lie, "which has 2097152 bytes");
  lie.offset = 2 * kMiB;
  lie.bytes = 1;
  expect_refused(process, lie, "which has 2097152 bytes");
  lie.offset = 3 * kMiB;
  expect_refused(process, lie, "which has 2097152 bytes");
  lie.pieces[0].bytes = kMost;
  expect_refused(process, lie, "more bytes than device");
  lie.pieces[0].bytes = 0;
  expect_refused(process, lie, "an allocation of 0 bytes");

  const auto segments = process.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(segments);
  for (const std::size_t index : {std::size_t{0}, std::size_t{1}}) {
    lie = copy_of(*segments);
    lie.bytes = 2 * kMiB;
    lie.pieces[index].bytes = 4 * kMiB;
    expect_refused(process, lie, "which its fd may not have");
    lie.pieces[index].bytes = 2 * kMiB + 4096;
    expect_refused(process, lie, "no multiple of");
    lie.pieces[index].bytes = 0;
    expect_refused(process, lie, "an allocation of 0 bytes");
    lie.pieces[index].bytes = kMost;
    expect_refused(process, lie, "more bytes than device");
    lie.pieces[index].bytes = std::uint64_t{1} << 63;
    expect_refused(process, lie, "more bytes than device");
  }
}

TEST_F(ImporterTest, AllocationsThatAreNotOneRegionAreRefused) {
  const ExporterProcess process;
  const auto true_one = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(true_one);
  Exported lie = copy_of(*true_one);
  lie.pieces.push_back({});
  lie.pieces[1].bytes = kMiB;
  expect_refused(process, lie, "names 2 allocations");
  lie.pieces.clear();
  expect_refused(process, lie, "names no allocation");
  lie = copy_of(*true_one);
  lie.kind = static_cast<RegionKind>(0);
  expect_refused(process, lie, "region kind 0 is no device memory");
  lie.kind = static_cast<RegionKind>(200);
  expect_refused(process, lie, "region kind 200 is no device memory");
}

TEST_F(ImporterTest, BytesThatAreNoHandleAreRefused) {
  const ExporterProcess process;
  const auto true_one = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(true_one);
  Exported lie = copy_of(*true_one);
  lie.pieces[0].handle = {};
  expect_refused(process, lie, "it is no handle");
  lie.pieces[0].handle.fill(0xff);
  expect_refused(process, lie, "it is no handle");
  lie.pieces[0].handle = process.ask({.act = Act::make_event}).event;
  expect_refused(process, lie, "it is no handle");
  for (const std::size_t at : {std::size_t{0}, std::size_t{31}, std::size_t{63}}) {
    lie.pieces[0].handle = true_one->pieces[0].handle;
    lie.pieces[0].handle[at] ^= 1;
    expect_refused(process, lie, "it is no handle");
  }
}

TEST_F(ImporterTest, FdsThatAreNoDeviceMemoryAreRefused) {
  const ExporterProcess process;
  const auto true_one = process.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(true_one);
  Exported lie = copy_of(*true_one);
  lie.pieces[1].fd.reset();
  expect_refused(process, lie, "no fd came with it");
  lie.pieces[1].fd = std::move(*make_memfd("other", 4 * kMiB));
  expect_refused(process, lie, "importing its fd");
  int ends[2] = {-1, -1};
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd write_end = UniqueFd::adopt(ends[1]);
  lie.pieces[1].fd = UniqueFd::adopt(ends[0]);
  expect_refused(process, lie, "importing its fd");
  // A legacy handle where an fd belongs, and the reverse.
  const auto legacy = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(legacy);
  lie = copy_of(*legacy);
  lie.kind = RegionKind::cuda_vmm;
  expect_refused(process, lie, "no fd came with it");
  lie = copy_of(*true_one);
  lie.kind = RegionKind::cuda_legacy;
  lie.pieces.pop_back();
  lie.bytes = kMiB;
  expect_refused(process, lie, "it is no handle");
  lie.kind = RegionKind::cuda_local;
  expect_refused(process, lie, "only taken from this very process");
}

TEST_F(ImporterTest, ADeviceThatThisProcessDoesNotSeeIsNamed) {
  const ExporterProcess process(Environment{{"FAKECUDA_DEVICES", "3"}});
  for (const Kind kind : {Kind::allocation, Kind::segments}) {
    const auto exported = process.exported(kind, 2 * kMiB, 1, 0, kMiB, 2);
    ASSERT_TRUE(exported) << exported.error().to_string();
    expect_refused(process, *exported,
                   exported->device.text() + ", which this process does not see");
  }
}

TEST_F(ImporterTest, MemoryOfAnotherDeviceThanDeclaredIsRefused) {
  const ExporterProcess process;
  for (const Kind kind : {Kind::allocation, Kind::segments}) {
    auto exported = process.exported(kind, 2 * kMiB, 1, 0, kMiB, 1);
    ASSERT_TRUE(exported);
    exported->device = devices_->all()[0].uuid;
    expect_refused(process, *exported, "on another device than");
    exported->device = devices_->all()[1].uuid;
    const auto memory = open(process, *exported);
    ASSERT_TRUE(memory) << memory.error().to_string();
    if (kind != Kind::allocation) continue;
    // While it is open on its own device, too.
    exported->device = devices_->all()[0].uuid;
    EXPECT_TRUE(refuses(open(process, *exported), Errc::bad_region, "on another device than"));
  }
}

TEST_F(ImporterTest, MemoryThatIsGoneIsRefused) {
  ExporterProcess process;
  const auto freed = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(freed);
  ASSERT_EQ(process.ask({.act = Act::free}).code, Errc::ok);
  expect_refused(process, *freed, "its process ended or freed the memory");
  const auto orphaned = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(orphaned);
  process.kill_now();
  expect_refused(process, *orphaned, "its process ended or freed the memory");
}

TEST_F(ImporterTest, AHandleOfAnotherUserIsTakenOnlyWhereTheConfigurationSaysSo) {
  const ExporterProcess process;
  const auto legacy = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(legacy);
  const Exporter stranger{1, process.pid(), ::geteuid() + 1};
  const std::uint64_t opened = calls("cuIpcOpenMemHandle");
  const auto refused = sut_->open(stranger, *legacy, Access::read_only, "trainer/x: region 0");
  EXPECT_TRUE(refuses(refused, Errc::permission, "cuda.legacy_across_uids"));
  EXPECT_TRUE(refuses(refused, Errc::permission, "cannot be revoked"));
  EXPECT_EQ(calls("cuIpcOpenMemHandle"), opened);
  Importer open_hearted(devices_, true);
  EXPECT_TRUE(open_hearted.open(stranger, *legacy, Access::read_only, "trainer/x: region 0"));
  // An fd was handed over by the kernel, which nobody can guess.
  const auto segments = process.exported(Kind::segments, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(segments);
  EXPECT_TRUE(sut_->open(stranger, *segments, Access::read_only, "trainer/x: region 0"));
}

// ---- when the driver fails, and when several threads want the same

TEST_F(ImporterTest, DocumentedErrorsOfOpeningSayWhatTheyMean) {
  const ExporterProcess process;
  const auto exported = process.exported(Kind::allocation, 2 * kMiB, 1, 0, kMiB);
  ASSERT_TRUE(exported);
  const std::tuple<int, Errc, const char*> cases[] = {
      {CUDA_ERROR_ALREADY_MAPPED, Errc::cuda, "has it open in another way"},
      {CUDA_ERROR_TOO_MANY_PEERS, Errc::cuda, "as many others as it can"},
      {CUDA_ERROR_INVALID_DEVICE, Errc::bad_region, "/dev/nvidia"},
      {CUDA_ERROR_MAP_FAILED, Errc::bad_region, "CUDA_ERROR_MAP_FAILED"},
      {CUDA_ERROR_OUT_OF_MEMORY, Errc::cuda, "CUDA_ERROR_OUT_OF_MEMORY"},
      {CUDA_ERROR_ILLEGAL_ADDRESS, Errc::cuda, "cuIpcOpenMemHandle"},
  };
  for (const auto& [code, errc, words] : cases) {
    faults("cuIpcOpenMemHandle#1=" + std::to_string(code));
    const auto refused = open(process, *exported);
    EXPECT_TRUE(refuses(refused, errc, words));
    if (errc == Errc::cuda) {
      EXPECT_EQ(refused.error().native, code);
    }
    faults("");
  }
  EXPECT_TRUE(open(process, *exported));
}

// Every call of an import fails in turn; nothing is left, and the next one succeeds.
TEST_F(ImporterTest, LeavesNothingWhenAnyCallFails) {
  const ExporterProcess process;
  static_cast<void>(context());
  const std::size_t fds = open_fds();
  for (const Kind kind : {Kind::allocation, Kind::segments}) {
    const auto exported = process.exported(kind, 2 * kMiB, kind == Kind::segments ? 3 : 1, 0, kMiB);
    ASSERT_TRUE(exported);
    const int failed = fail_each(
        {"cuCtxPushCurrent", "cuIpcOpenMemHandle", "cuMemGetAddressRange", "cuPointerGetAttribute",
         "cuMemGetAllocationGranularity", "cuMemAddressReserve", "cuMemImportFromShareableHandle",
         "cuMemGetAllocationPropertiesFromHandle", "cuMemMap", "cuMemSetAccess"},
        [&] {
          const auto memory = open(process, *exported);
          faults("");  // not for what closes it
          if (!memory) expect_nothing_held();
          return memory.has_value();
        });
    EXPECT_GT(failed, 3);
    EXPECT_EQ(open_fds(), fds + exported->pieces.size() * (kind == Kind::segments ? 1 : 0));
    const auto again = open(process, *exported);
    EXPECT_TRUE(again);
  }
}

TEST_F(ImporterTest, ThreadsThatWantTheSameMemoryShareIt) {
  constexpr std::size_t kThreads = 4;
  const ExporterProcess process;
  const auto exported = process.exported(Kind::allocation, 2 * kMiB, 1, 0, 2 * kMiB);
  ASSERT_TRUE(exported);
  const std::uint64_t opened = calls("cuIpcOpenMemHandle");
  std::array<std::shared_ptr<const DeviceMemory>, kThreads> held_by;
  std::vector<std::thread> threads(kThreads);
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads[i] = std::thread([&, i] {
      if (const auto memory = open(process, *exported)) held_by[i] = *memory;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(calls("cuIpcOpenMemHandle"), opened + 1);
  for (const auto& memory : held_by) {
    ASSERT_NE(memory, nullptr);
    EXPECT_EQ(memory->address, held_by[0]->address);
  }
}

// Sessions come and go on several threads; nothing is closed under another's hands.
TEST_F(ImporterTest, ThreadsOpenAndDropBesideEachOther) {
  const ExporterProcess process;
  const auto legacy = process.exported(Kind::allocation, 2 * kMiB, 1, 0, 2 * kMiB);
  const ExporterProcess other;
  const auto segments = other.exported(Kind::segments, 2 * kMiB, 2, 0, 4 * kMiB);
  ASSERT_TRUE(legacy && segments);
  std::vector<std::thread> threads(4);
  for (std::size_t i = 0; i < threads.size(); ++i) {
    threads[i] = std::thread([&, i] {
      for (std::size_t round = 0; round < 200; ++round) {
        const auto memory = round % 8 == 7
                                ? open(other, *segments)
                                : open(process, *legacy, Access::read_only, (i + round) % 3);
        ASSERT_TRUE(memory) << memory.error().to_string();
        if (round % 16 < 2) {
          ASSERT_TRUE(holds_pattern((*memory)->address, 64, 0));
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect_nothing_held();
}

}  // namespace
}  // namespace refit::cuda::test
