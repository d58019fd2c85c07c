// What the daemon tells systemd about its health: it pings from its loop, and only while its
// workers get on. Method: the test is systemd, with a notification socket of its own.

#include <cstdlib>
#include <thread>

#include "support/daemon_test.hpp"
#include "support/notify_socket.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr auto kPeriod = 400ms;

class Watchdog : public DaemonTest {
 protected:
  void SetUp() override {
    const std::string path = directory_.path() + "/notify";
    systemd_.emplace(path);
    ::setenv("NOTIFY_SOCKET", path.c_str(), 1);
    ::setenv("WATCHDOG_USEC", std::to_string(std::chrono::microseconds(kPeriod).count()).c_str(),
             1);
  }
  void TearDown() override {
    ::unsetenv("NOTIFY_SOCKET");
    ::unsetenv("WATCHDOG_USEC");
    daemon_.reset();
    systemd_.reset();
  }

  void expect_pings(int count) { EXPECT_TRUE(systemd_->pings(count)) << "no more pings"; }

  std::optional<NotifySocket> systemd_;
};

TEST_F(Watchdog, IdleDaemonGoesOnPinging) {
  start();
  expect_pings(6);
}

TEST_F(Watchdog, DaemonThatNeverBlocksPingsToo) {
  if (std::thread::hardware_concurrency() < 2) GTEST_FAIL() << "`always` needs two cores";
  DaemonOptions how;
  how.arguments = {"--waiting", "always"};
  start(how);
  auto source = model_of(small_tensors(), 31);
  Trainer trainer = make_trainer(*source);  // it spins only while somebody is there
  expect_pings(6);
}

// Goal: a loop that runs well does not hide a worker that hangs, and with it every refit. Method:
// one thread of the copy pool never returns from its job; the loop still answers a ping of ours.
TEST_F(Watchdog, HangingCopyThreadStopsThePings) {
  reconnect_ = false;
  start_armed("copy.ended=hang");
  auto source = model_of(large_tensors(), 31);
  auto target = model_of(large_tensors(), 30);
  Engine engine = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  Trainer other = connect_trainer();
  expect_pings(2);
  BackgroundRefit refit(trainer, {{"flux", "transformer"}}, soon());
  BackgroundGate gate(engine, soon());
  EXPECT_TRUE(systemd_->pings_stop(kPeriod));
  EXPECT_TRUE(other.ping(soon())) << "the loop hangs too: this test proved less than it says";
  daemon_->kill_now();
  EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone);
}

}  // namespace
}  // namespace refit::test
