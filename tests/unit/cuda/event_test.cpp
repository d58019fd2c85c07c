// Events between two processes: what was recorded in one is waited for in the other.

#include "memory/cuda/event.hpp"

#include "memory/cuda/import.hpp"
#include "unit/cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

class IpcEventTest : public CudaTest {
 protected:
  IpcHandle event_of(const ExporterProcess& process) {
    const Answer answer = process.ask({.act = Act::make_event});
    EXPECT_EQ(answer.code, Errc::ok) << answer.message;
    return answer.event;
  }
};

// The other process's stream is lazy: without the wait the copy reads the bytes of before.
TEST_F(IpcEventTest, AStreamWaitsForAnotherProcesssWork) {
  const ExporterProcess process;
  const auto exported = process.exported(Kind::allocation, kMiB, 1, 0, kMiB);
  ASSERT_TRUE(exported);
  Importer importer(devices_, false);
  const auto memory =
      importer.open({1, process.pid(), ::geteuid()}, *exported, Access::read_only, "source");
  ASSERT_TRUE(memory) << memory.error().to_string();
  const auto event = IpcEvent::open(context(), event_of(process), "fence");
  ASSERT_TRUE(event) << event.error().to_string();
  ASSERT_EQ(process.ask({.act = Act::fill_and_record, .offset = 0x5c}).code, Errc::ok);

  const auto held_context = context();
  const auto current = Current::enter(*held_context);
  ASSERT_TRUE(current);
  const Driver& driver = devices_->driver();
  const auto early = event->passed("fence");
  EXPECT_TRUE(early && !*early);
  CUstream stream = nullptr;
  must(driver.stream_create(&stream, CU_STREAM_NON_BLOCKING));
  void* read = nullptr;
  must(cuda().cuMemHostAlloc(&read, kMiB, 0));
  must(driver.stream_wait_event(stream, event->get(), CU_EVENT_WAIT_DEFAULT));
  must(driver.memcpy_async(reinterpret_cast<CUdeviceptr>(read), (*memory)->address, kMiB, stream));
  must(driver.stream_synchronize(stream));
  EXPECT_EQ(std::string(static_cast<const char*>(read), kMiB), std::string(kMiB, 0x5c));
  const auto late = event->passed("fence");
  EXPECT_TRUE(late && *late);
  faults("cuEventQuery#1=2");
  EXPECT_TRUE(refuses(event->passed("fence"), Errc::cuda, "cuEventQuery"));
  faults("");
  must(cuda().cuMemFreeHost(read));
  must(driver.stream_destroy(stream));
}

TEST_F(IpcEventTest, BytesThatAreNoHandleAreRefused) {
  EXPECT_TRUE(refuses(IpcEvent::open(context(), IpcHandle{}, "trainer's fence"), Errc::bad_argument,
                      "trainer's fence"));
  const ExporterProcess process;
  IpcHandle flipped = event_of(process);
  flipped[17] ^= 4;
  EXPECT_TRUE(
      refuses(IpcEvent::open(context(), flipped, "fence"), Errc::bad_argument, "no handle"));
  const auto memory = process.exported(Kind::allocation, kMiB, 1, 0, kMiB);
  ASSERT_TRUE(memory);
  EXPECT_TRUE(refuses(IpcEvent::open(context(), memory->pieces[0].handle, "fence"),
                      Errc::bad_argument, "no handle"));
}

TEST_F(IpcEventTest, AnEventThatIsGoneIsRefused) {
  ExporterProcess process;
  const IpcHandle destroyed = event_of(process);
  ASSERT_EQ(process.ask({.act = Act::destroy_event}).code, Errc::ok);
  EXPECT_TRUE(refuses(IpcEvent::open(context(), destroyed, "fence"), Errc::bad_argument, "ended"));
  const IpcHandle orphaned = event_of(process);
  process.kill_now();
  EXPECT_TRUE(refuses(IpcEvent::open(context(), orphaned, "fence"), Errc::bad_argument, "ended"));
}

TEST_F(IpcEventTest, AnEventOfThisProcessIsNotOpenedInIt) {
  const auto event = IpcEvent::create(context(), "own fence");
  ASSERT_TRUE(event);
  const auto handle = event->handle("own fence");
  ASSERT_TRUE(handle);
  EXPECT_TRUE(refuses(IpcEvent::open(context(), *handle, "own fence"), Errc::bad_argument,
                      "this very one"));
}

TEST_F(IpcEventTest, IsDestroyedOnceHoweverItMoves) {
  auto first = IpcEvent::create(context(), "first");
  auto second = IpcEvent::create(context(), "second");
  ASSERT_TRUE(first && second);
  ASSERT_EQ(held("events"), 2U);
  {
    IpcEvent moved = std::move(*first);
    moved = std::move(*second);
    EXPECT_EQ(held("events"), 1U);
  }
  EXPECT_EQ(held("events"), 0U);
}

TEST_F(IpcEventTest, ADeviceWithoutThemSaysWhatToDo) {
  const ExporterProcess process(Environment{{"FAKECUDA_DEVICE_0", "ipc=0"}});
  const Answer answer = process.ask({.act = Act::make_event});
  EXPECT_EQ(answer.code, Errc::unsupported);
  EXPECT_NE(std::string(answer.message).find("synchronise the stream"), std::string::npos);
}

}  // namespace
}  // namespace refit::cuda::test
