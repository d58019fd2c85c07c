// What the daemon tells systemd about its health: it pings from its loop, and only while its
// workers get on. Method: the test is systemd, with a notification socket of its own.

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <thread>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr auto kPeriod = 400ms;

class Watchdog : public DaemonTest {
 protected:
  void SetUp() override {
    const std::string path = directory_.path() + "/notify";
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    socket_fd_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    ASSERT_EQ(::bind(socket_fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    ::setenv("NOTIFY_SOCKET", path.c_str(), 1);
    ::setenv("WATCHDOG_USEC", std::to_string(std::chrono::microseconds(kPeriod).count()).c_str(),
             1);
    reader_ = std::thread([this] { read_messages(); });
  }
  void TearDown() override {
    ::unsetenv("NOTIFY_SOCKET");
    ::unsetenv("WATCHDOG_USEC");
    daemon_.reset();
    ::shutdown(socket_fd_, SHUT_RDWR);
    if (reader_.joinable()) reader_.join();
    ::close(socket_fd_);
  }

  /// On a thread of its own: a socket that nobody reads is full after ten messages, and then blocks
  /// the daemon.
  void read_messages() {
    char text[1024];
    for (;;) {
      const ssize_t bytes = ::recv(socket_fd_, text, sizeof text, 0);
      if (bytes <= 0) return;
      if (std::string_view(text, static_cast<std::size_t>(bytes)) == "WATCHDOG=1") ++pings_;
    }
  }
  void expect_pings(int count) {
    const int before = pings_.load();
    EXPECT_TRUE(eventually([&] { return pings_.load() >= before + count; })) << "no more pings";
  }
  /// True once no ping came for several periods.
  bool pings_stop() {
    return eventually([&] {
      const int before = pings_.load();
      std::this_thread::sleep_for(5 * kPeriod);
      return pings_.load() == before;
    });
  }

  int socket_fd_ = -1;
  std::atomic<int> pings_{0};
  std::thread reader_;
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
  EXPECT_TRUE(pings_stop());
  EXPECT_TRUE(other.ping(soon())) << "the loop hangs too: this test proved less than it says";
  daemon_->kill_now();
  EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone);
}

}  // namespace
}  // namespace refit::test
