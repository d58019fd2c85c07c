// Memory and events of one process in another one.

#include <sys/stat.h>

#include "support/effort.hpp"
#include "unit/fake_cuda/fixture.hpp"
#include "unit/fake_cuda/peer.hpp"
#include "unit/fake_cuda/refit.hpp"

namespace fakecuda::test {
namespace {

using namespace std::string_literals;

constexpr std::size_t kSharedBytes = 3 * 4096 + 5;
constexpr std::size_t kPhysicalBytes = std::size_t{2} << 20;

class FakeIpc : public FakeCuda {
 protected:
  static Question question(Order order) {
    Question made;
    made.order = order;
    return made;
  }
  static Question open_question(CUdeviceptr pointer) {
    Question made = question(Order::open_memory);
    EXPECT_EQ(cuda().cuIpcGetMemHandle(&made.memory, pointer), CUDA_SUCCESS);
    return made;
  }
};

/// The source's half of the refit in miniature, against a peer that is the sink.
class FakeRefit : public FakeIpc {
 protected:
  enum class Kind { legacy, vmm };

  /// Whether the sink got the right weights.
  bool refit(const Peer& sink, Kind kind, std::uint64_t seed, const std::string& source_schedule,
             const std::string& sink_schedule, Mistake mistake) {
    configure({{"SEED", std::to_string(seed)}, {"ROLE", "source"}, {"SCHEDULE", source_schedule}});
    Question ask = question(Order::refit);
    ask.number = seed;
    ask.bytes = kPhysicalBytes;
    ask.text[0] = static_cast<char>(mistake);
    std::strncpy(ask.schedule, sink_schedule.c_str(), sizeof ask.schedule - 1);
    int fd = -1;
    CUdeviceptr weights = 0;
    if (kind == Kind::legacy) {
      weights = allocate(kWeightBytes);
      EXPECT_EQ(cuda().cuIpcGetMemHandle(&ask.memory, weights), CUDA_SUCCESS);
    } else {
      weights = make_physical(fd);
    }
    const CUstream stream = make_stream();
    const CUevent written = make_event(CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING);
    EXPECT_EQ(cuda().cuIpcGetEventHandle(&ask.event, written), CUDA_SUCCESS);
    bool right = false;
    {
      Pinned fresh(kWeightBytes);
      for (std::size_t i = 0; i < kWeightBytes; ++i) fresh.data()[i] = weight(seed, i);
      EXPECT_EQ(cuda().cuMemcpyHtoDAsync(weights, fresh.data(), kWeightBytes, stream),
                CUDA_SUCCESS);
      EXPECT_EQ(cuda().cuEventRecord(written, stream), CUDA_SUCCESS);
      const Answer answer = sink.ask(ask, fd);
      EXPECT_EQ(answer.result, CUDA_SUCCESS);
      EXPECT_EQ(answer.violations, 0U);
      right = answer.value == 1;
      EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_SUCCESS);
    }
    EXPECT_EQ(cuda().cuEventDestroy(written), CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuStreamDestroy(stream), CUDA_SUCCESS);
    if (kind == Kind::legacy) {
      EXPECT_EQ(cuda().cuMemFree(weights), CUDA_SUCCESS);
    } else {
      ::close(fd);
      EXPECT_EQ(cuda().cuMemUnmap(weights, kPhysicalBytes), CUDA_SUCCESS);
      EXPECT_EQ(cuda().cuMemAddressFree(weights, kPhysicalBytes), CUDA_SUCCESS);
    }
    return right;
  }

 private:
  static CUdeviceptr make_physical(int& fd) {
    CUmemAllocationProp properties{};
    properties.type = CU_MEM_ALLOCATION_TYPE_PINNED;
    properties.location = {CU_MEM_LOCATION_TYPE_DEVICE, 0};
    properties.requestedHandleTypes = CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR;
    CUmemGenericAllocationHandle handle = 0;
    CUdeviceptr pointer = 0;
    EXPECT_EQ(cuda().cuMemCreate(&handle, kPhysicalBytes, &properties, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuMemAddressReserve(&pointer, kPhysicalBytes, 0, 0, 0), CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuMemMap(pointer, kPhysicalBytes, 0, handle, 0), CUDA_SUCCESS);
    CUmemAccessDesc access{{CU_MEM_LOCATION_TYPE_DEVICE, 0}, CU_MEM_ACCESS_FLAGS_PROT_READWRITE};
    EXPECT_EQ(cuda().cuMemSetAccess(pointer, kPhysicalBytes, &access, 1), CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuMemExportToShareableHandle(&fd, handle,
                                                  CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR, 0),
              CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuMemRelease(handle), CUDA_SUCCESS);
    return pointer;
  }
};

// Goal: a client that waits for everything is right whatever the schedules are.
TEST_F(FakeRefit, CorrectClientIsAlwaysRight) {
  constexpr std::uint64_t kSeeds = refit::test::rounds(200);
  const std::pair<std::string, std::string> schedules[] = {{"eager", "eager"},
                                                           {"lazy", "lazy"},
                                                           {"mixed", "mixed"},
                                                           {"eager", "lazy"},
                                                           {"lazy", "eager"}};
  const Peer sink(Environment{{"FAKECUDA_ROLE", "sink"}});
  for (const Kind kind : {Kind::legacy, Kind::vmm}) {
    for (const auto& [source_schedule, sink_schedule] : schedules) {
      std::uint64_t right = 0;
      for (std::uint64_t seed = 0; seed < kSeeds; ++seed)
        right += refit(sink, kind, seed, source_schedule, sink_schedule, Mistake::none) ? 1U : 0U;
      EXPECT_EQ(right, kSeeds) << source_schedule << " source, " << sink_schedule << " sink";
    }
  }
}

// Goal: whoever forgets a wait reads wrong bytes, every time, if all streams are lazy.
TEST_F(FakeRefit, EveryMissingWaitShowsEveryTimeWhenAllIsLazy) {
  constexpr std::uint64_t kSeeds = refit::test::rounds(50);
  const Peer sink(Environment{{"FAKECUDA_ROLE", "sink"}});
  for (const Kind kind : {Kind::legacy, Kind::vmm}) {
    for (const Mistake mistake :
         {Mistake::no_wait_for_source, Mistake::no_event_between_streams, Mistake::no_sync}) {
      std::uint64_t right = 0;
      for (std::uint64_t seed = 0; seed < kSeeds; ++seed)
        right += refit(sink, kind, seed, "lazy", "lazy", mistake) ? 1U : 0U;
      EXPECT_EQ(right, 0U) << "mistake " << static_cast<int>(mistake);
    }
  }
}

TEST_F(FakeIpc, HandlesAreOpaqueAndOpenOnlyElsewhere) {
  const CUdeviceptr pointer = allocate(kSharedBytes);
  CUipcMemHandle first{};
  CUipcMemHandle second{};
  MUST(cuda().cuIpcGetMemHandle(&first, pointer));
  MUST(cuda().cuIpcGetMemHandle(&second, pointer));
  EXPECT_NE(std::memcmp(&first, &second, sizeof first), 0) << "their bytes are no identity";
  CUdeviceptr opened = 0;
  EXPECT_EQ(cuda().cuIpcOpenMemHandle(&opened, first, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS),
            CUDA_ERROR_INVALID_CONTEXT);
  EXPECT_EQ(cuda().cuIpcOpenMemHandle(&opened, first, 0), CUDA_ERROR_INVALID_VALUE);
  const CUevent event = make_event(CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING);
  CUipcEventHandle handle{};
  MUST(cuda().cuIpcGetEventHandle(&handle, event));
  CUevent opened_event = nullptr;
  EXPECT_EQ(cuda().cuIpcOpenEventHandle(&opened_event, handle), CUDA_ERROR_INVALID_CONTEXT);
  const CUevent plain = make_event();
  EXPECT_NE(cuda().cuIpcGetEventHandle(&handle, plain), CUDA_SUCCESS);
  MUST(cuda().cuEventDestroy(plain));
  MUST(cuda().cuEventDestroy(event));

  // A pointer into it gives the whole; whoever forgets the offset reads at the base.
  MUST(cuda().cuMemcpyHtoD(pointer, "base", 4));
  MUST(cuda().cuMemcpyHtoD(pointer + 100, "inside", 6));
  const Peer peer;
  EXPECT_EQ(peer.ask(open_question(pointer + 100)).result, CUDA_SUCCESS);
  EXPECT_EQ(peer.ask(question(Order::read_kept)).value, 'b');
  // Opened twice it is the same import, and has to be closed twice.
  EXPECT_EQ(peer.ask(open_question(pointer)).result, CUDA_SUCCESS);
  EXPECT_EQ(peer.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  EXPECT_EQ(peer.ask(question(Order::read_kept)).value, 'b');
  EXPECT_EQ(peer.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  EXPECT_GT(peer.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  for (std::size_t i = 0; i < sizeof(CUipcMemHandle); ++i) {
    Question broken = open_question(pointer);
    broken.memory.reserved[i] ^= 1;
    EXPECT_GT(peer.ask(broken).result, CUDA_SUCCESS) << "byte " << i;
  }
  MUST(cuda().cuMemFree(pointer));
}

// Goal: the documentation forbids to free what others have open; here both sides hear of it.
TEST_F(FakeIpc, FreeWhileImportedIsSeenOnBothSides) {
  const CUdeviceptr pointer = allocate(kSharedBytes);
  const Peer peer;
  ASSERT_EQ(peer.ask(open_question(pointer)).result, CUDA_SUCCESS);
  EXPECT_EQ(peer.ask(question(Order::read_kept)).violations, 0U);
  const Question again = open_question(pointer);
  MUST(cuda().cuMemFree(pointer));
  EXPECT_TRUE(violated("has it open"));
  const Answer answer = peer.ask(question(Order::read_kept));
  EXPECT_EQ(answer.violations, 1U);
  EXPECT_EQ(answer.value, 0xddU) << "the bytes are no more what they were";
  EXPECT_EQ(peer.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  EXPECT_GT(peer.ask(again).result, CUDA_SUCCESS) << "a handle of freed memory";
  const auto report = ProcessReport::open(directory(), peer.pid());
  ASSERT_TRUE(report);
  EXPECT_NE((*report)->violations().find("has freed"), std::string::npos);
}

// Goal: a killed importer does not count as one.
TEST_F(FakeIpc, FreeAfterTheImporterWasKilledIsFine) {
  const CUdeviceptr pointer = allocate(kSharedBytes);
  Peer peer;
  ASSERT_EQ(peer.ask(open_question(pointer)).result, CUDA_SUCCESS);
  peer.kill_now();
  MUST(cuda().cuMemFree(pointer));
}

// Goal: legacy memory goes with its exporter, VMM memory stays; a waiter does not wait for the
// dead.
TEST_F(FakeIpc, ExportersDeathIsSurvived) {
  Question ask = question(Order::export_both);
  ask.bytes = kSharedBytes;
  for (const std::string& setting : {"poison"s, "keep"s, "fault"s}) {
    configure({{"EXPORTER_DEATH", setting}});
    Peer peer;
    int fd = -1;
    const Answer exported = peer.ask(ask, -1, &fd);
    ASSERT_EQ(exported.result, CUDA_SUCCESS);
    Question fill = question(Order::record);
    fill.number = 7;
    ASSERT_EQ(peer.ask(fill).result, CUDA_SUCCESS);
    CUdeviceptr pointer = 0;
    CUevent event = nullptr;
    MUST(cuda().cuIpcOpenMemHandle(&pointer, exported.memory, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
    MUST(cuda().cuIpcOpenEventHandle(&event, exported.event));
    EXPECT_EQ(cuda().cuEventQuery(event), CUDA_ERROR_NOT_READY);
    peer.kill_now();
    const std::uint64_t orphans = cuda().control.gauge("orphaned_waits");
    MUST(cuda().cuEventSynchronize(event));
    EXPECT_EQ(cuda().control.gauge("orphaned_waits"), orphans + 1);
    if (setting == "fault") {
      unsigned char byte = 0;
      EXPECT_EQ(cuda().cuMemcpyDtoH(&byte, pointer, 1), CUDA_ERROR_ILLEGAL_ADDRESS);
      cuda().control.recover();
    } else {
      EXPECT_TRUE(device_is_all(pointer, kSharedBytes, setting == "keep" ? 0xfb : 0xdd));
    }
    MUST(cuda().cuEventDestroy(event));
    MUST(cuda().cuIpcCloseMemHandle(pointer));

    CUmemGenericAllocationHandle handle = 0;
    MUST(cuda().cuMemImportFromShareableHandle(
        &handle, reinterpret_cast<void*>(static_cast<std::intptr_t>(fd)),
        CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR));
    ::close(fd);
    MUST(cuda().cuMemRelease(handle));
  }
}

// Goal: whenever a process is killed, nothing stays locked for the others. Method: orders are sent
// and not waited for, so that it dies in the middle of any of them.
TEST_F(FakeIpc, KilledAtAnyMomentItHoldsUpNobody) {
  Question ask = question(Order::export_both);
  ask.bytes = kSharedBytes;
  for (int round = 0; round < 30; ++round) {
    Peer peer;
    const Answer exported = peer.ask(ask);
    ASSERT_EQ(exported.result, CUDA_SUCCESS);
    CUdeviceptr pointer = 0;
    CUevent event = nullptr;
    MUST(cuda().cuIpcOpenMemHandle(&pointer, exported.memory, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
    MUST(cuda().cuIpcOpenEventHandle(&event, exported.event));
    const CUstream stream = make_stream();
    for (int i = 0; i < round; ++i) peer.tell(question(Order::record));
    MUST(cuda().cuEventRecord(event, stream));
    MUST(cuda().cuMemsetD8Async(pointer, 1, kSharedBytes, stream));
    peer.kill_now();
    MUST(cuda().cuEventSynchronize(event));
    MUST(cuda().cuStreamSynchronize(stream));
    MUST(cuda().cuStreamDestroy(stream));
    MUST(cuda().cuEventDestroy(event));
    MUST(cuda().cuIpcCloseMemHandle(pointer));
  }
}

// Goal: work of another process runs when a waiter here needs it, and only then.
TEST_F(FakeIpc, WaiterMakesTheOtherProcessWork) {
  Peer peer;
  Question ask = question(Order::export_both);
  ask.bytes = kSharedBytes;
  const Answer exported = peer.ask(ask);
  ASSERT_EQ(exported.result, CUDA_SUCCESS);
  CUdeviceptr pointer = 0;
  CUevent event = nullptr;
  MUST(cuda().cuIpcOpenMemHandle(&pointer, exported.memory, CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS));
  MUST(cuda().cuIpcOpenEventHandle(&event, exported.event));
  for (unsigned char round = 1; round < 100; ++round) {
    Question fill = question(Order::record);
    fill.number = round;
    ASSERT_EQ(peer.ask(fill).result, CUDA_SUCCESS);
    EXPECT_FALSE(device_is_all(pointer, kSharedBytes, round));
    MUST(cuda().cuEventSynchronize(event));
    EXPECT_TRUE(device_is_all(pointer, kSharedBytes, round));
  }
  MUST(cuda().cuIpcCloseMemHandle(pointer));
  ASSERT_EQ(peer.ask(question(Order::free_export)).result, CUDA_SUCCESS);
  EXPECT_EQ(cuda().cuEventQuery(event), CUDA_SUCCESS);
  EXPECT_TRUE(violated("has destroyed"));
  MUST(cuda().cuEventDestroy(event));
}

TEST_F(FakeIpc, OtherUserIsRefusedUnlessAllowed) {
  if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can start a peer of another uid";
  ASSERT_EQ(::chmod(directory().c_str(), 0777), 0);
  const CUdeviceptr pointer = allocate(kSharedBytes);
  constexpr unsigned int kNobody = 65534;
  {
    const Peer stranger({}, kNobody);
    EXPECT_GT(stranger.ask(open_question(pointer)).result, CUDA_SUCCESS);
  }
  const Peer stranger(Environment{{"FAKECUDA_FOREIGN_UID", "allow"}}, kNobody);
  EXPECT_EQ(stranger.ask(open_question(pointer)).result, CUDA_SUCCESS);
  EXPECT_EQ(stranger.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  MUST(cuda().cuMemFree(pointer));
  ASSERT_EQ(::chmod(directory().c_str(), 0700), 0);
}

// Goal: devices are hidden and renumbered as by CUDA_VISIBLE_DEVICES; memory of one without a
// device node cannot be imported.
TEST_F(FakeIpc, HiddenAndAbsentDevices) {
  const CUdeviceptr pointer = allocate(kSharedBytes);
  const Peer hidden(Environment{{"CUDA_VISIBLE_DEVICES", "1"}});
  EXPECT_EQ(hidden.ask(question(Order::device_count)).value, 1U);
  EXPECT_EQ(hidden.ask(open_question(pointer)).result, CUDA_SUCCESS);
  EXPECT_EQ(hidden.ask(question(Order::close_kept)).result, CUDA_SUCCESS);
  const Peer absent(Environment{{"FAKECUDA_ABSENT_DEVICES", "0"}});
  EXPECT_EQ(absent.ask(question(Order::device_count)).value, 1U);
  EXPECT_EQ(absent.ask(open_question(pointer)).result, CUDA_ERROR_INVALID_DEVICE);
  const Peer none(Environment{{"CUDA_VISIBLE_DEVICES", ""}});
  EXPECT_EQ(none.ask(question(Order::device_count)).result, CUDA_ERROR_NO_DEVICE);
  MUST(cuda().cuMemFree(pointer));
}

TEST_F(FakeIpc, DevicesAreAsTheEnvironmentSays) {
  Question ask = question(Order::export_both);
  ask.bytes = kSharedBytes;
  const std::pair<const char*, CUresult> cases[] = {{"ipc=0", CUDA_ERROR_NOT_SUPPORTED},
                                                    {"vmm=0", CUDA_ERROR_NOT_SUPPORTED},
                                                    {"memory=1M", CUDA_ERROR_OUT_OF_MEMORY},
                                                    {"granularity=4M", CUDA_ERROR_INVALID_VALUE},
                                                    {"memory=4M,cc=80", CUDA_SUCCESS}};
  for (const auto& [setting, result] : cases) {
    const Peer peer(Environment{{"FAKECUDA_DEVICE_0", setting}});
    EXPECT_EQ(peer.ask(ask).result, result) << setting;
  }
}

TEST_F(FakeIpc, ExclusiveDeviceHasOneProcess) {
  const Environment exclusive{{"FAKECUDA_DEVICE_1", "compute_mode=3"}};
  Question retain = question(Order::retain);
  retain.number = 1;
  const Peer second(exclusive);
  EXPECT_EQ(second.ask(retain).result, CUDA_ERROR_DEVICE_UNAVAILABLE)
      << "this process has a context on it";
  MUST(cuda().cuDevicePrimaryCtxRelease(1));
  EXPECT_EQ(second.ask(retain).result, CUDA_SUCCESS);
  MUST(cuda().cuDevicePrimaryCtxRetain(&contexts_[1], 1));
}

}  // namespace
}  // namespace fakecuda::test
