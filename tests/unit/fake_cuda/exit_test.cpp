// How a process ends that misused the driver.

#include "unit/fake_cuda/fixture.hpp"
#include "unit/fake_cuda/peer.hpp"

namespace fakecuda::test {
namespace {

class FakeExit : public FakeCuda {};

TEST_F(FakeExit, CodeTellsOfLeaksAndViolations) {
  const auto code = [](const char* what, const Environment& environment = {}) {
    const int status = run_peer_program({what}, environment);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  };
  EXPECT_EQ(code("clean"), 0);
  EXPECT_EQ(code("leak"), kBadExit);
  EXPECT_EQ(code("leak", {{"FAKECUDA_ON_LEAK", "ignore"}}), 0);
  EXPECT_EQ(code("misuse"), kBadExit);
  EXPECT_EQ(code("misuse", {{"FAKECUDA_ON_VIOLATION", "ignore"}}), 0);
  EXPECT_EQ(code("misuse", {{"FAKECUDA_ON_VIOLATION", "abort"}}), -SIGABRT);
  EXPECT_EQ(code("lose-work", {{"FAKECUDA_ON_LEAK", "ignore"}}), kBadExit);
  EXPECT_EQ(code("fork"), kBadExit);
  EXPECT_EQ(code("lost"), 0) << "nothing can be given back to a lost device";
  // A refused release is not the client's leak.
  EXPECT_EQ(code("clean", {{"FAKECUDA_FAULT", "cuMemFree#1=999"}}), 0);
}

TEST_F(FakeExit, CpuCannotReadDeviceMemory) {
  const int status = run_peer_program({"read-device-memory"});
  // A sanitizer makes an exit code of the signal.
  EXPECT_TRUE((WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV) ||
              (WIFEXITED(status) && WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != kBadExit))
      << status;
}

TEST_F(FakeExit, ReportStaysBehind) {
  Peer peer;
  Question question;
  question.order = Order::export_both;
  question.bytes = 4096;
  ASSERT_EQ(peer.ask(question).result, CUDA_SUCCESS);
  const pid_t pid = peer.pid();
  {
    const auto report = ProcessReport::open(directory(), pid);
    ASSERT_TRUE(report);
    EXPECT_EQ((*report)->calls_of("cuCtxPushCurrent"), 1U);
    EXPECT_EQ((*report)->gauge(Gauge::contexts), 1U);
    EXPECT_EQ((*report)->gauge(Gauge::device_bytes), 4096U + (2U << 20));
  }
  // It ends by releasing its context with an allocation, a stream and an event in it, and with the
  // handle of physical memory that no context owns.
  EXPECT_EQ(WEXITSTATUS(peer.end()), kBadExit);
  const auto report = ProcessReport::open(directory(), pid);
  ASSERT_TRUE(report);
  EXPECT_EQ((*report)->tally(Tally::leaks), 1U);
  EXPECT_NE((*report)->violations().find("1 ranges, 1 streams, 1 events"), std::string::npos);
}

}  // namespace
}  // namespace fakecuda::test
