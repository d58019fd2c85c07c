// The thread that copies on devices is watched like every other worker: one that hangs stops the
// pings, although the loop goes on.

#include "conformance/device_daemon_test.hpp"
#include "support/notify_socket.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr auto kPeriod = 400ms;

using CudaWatchdog = DeviceDaemonTest;

// Method: the thread never returns from telling that a copy has ended.
TEST_F(CudaWatchdog, HangingDeviceCopyThreadStopsThePings) {
  const std::string path = directory_.path() + "/notify";
  NotifySocket systemd(path);
  reconnect_ = false;
  DaemonOptions how;
  how.test_build = true;
  how.point = "device_copy.ended=hang";
  how.environment = {{"NOTIFY_SOCKET", path},
                     {"WATCHDOG_USEC", std::to_string(std::chrono::microseconds(kPeriod).count())}};
  start(how);
  Model source = device_model();
  Model target = device_model();
  Engine engine = make_engine("flux", target);
  Trainer trainer = make_trainer(source);
  Trainer other = connect_trainer();
  ASSERT_TRUE(systemd.pings(2));
  BackgroundRefit refit(trainer, {{"flux", "transformer"}}, soon());
  BackgroundGate gate(engine, soon());
  EXPECT_TRUE(systemd.pings_stop(kPeriod));
  EXPECT_TRUE(other.ping(soon())) << "the loop hangs too: this test proved less than it says";
  daemon_->kill_now();
  EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone);
}

}  // namespace
}  // namespace refit::test
