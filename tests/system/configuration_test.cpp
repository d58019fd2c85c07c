// The configuration of a running daemon: --check-config, --print-config, exit codes, and reloads by
// SIGHUP and by an operator.
//
// Each test starts the real binary as its own child.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <fstream>

#include "refit/observer.hpp"
#include "refit/trainer.hpp"
#include "support/daemon_process.hpp"
#include "support/eventually.hpp"
#include "support/must.hpp"
#include "support/other_user.hpp"
#include "support/program.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

int exit_code(const ProgramEnd& end) {
  return WIFEXITED(end.status) ? WEXITSTATUS(end.status) : -1;
}

class Configured : public ::testing::Test {
 protected:
  void write(const std::string& text) { std::ofstream(file_) << text; }
  static Deadline soon() { return Deadline::in(20s); }
  void start(std::vector<std::string> arguments = {}) {
    arguments.insert(arguments.begin(), {"--config", file_});
    DaemonOptions how;
    how.arguments = arguments;
    daemon_ = std::make_unique<DaemonProcess>(socket_, how);
  }
  Observer observer() { return must(Observer::connect("test", {socket_}, soon())); }
  static void expect_has(const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " is not in: " << text;
  }

  TemporaryDirectory directory_;
  std::string file_ = directory_.path() + "/refitd.toml";
  std::string socket_ = directory_.path() + "/refitd.sock";
  std::unique_ptr<DaemonProcess> daemon_;
};

TEST_F(Configured, CheckConfigTakesAGoodFileAndTouchesNothing) {
  write("verbose = true\n");
  const ProgramEnd sut = run_refitd({"--socket", socket_, "--check-config", file_});
  EXPECT_EQ(exit_code(sut), 0) << sut.output;
  EXPECT_NE(::access(socket_.c_str(), F_OK), 0);
  EXPECT_NE(::access((socket_ + ".lock").c_str(), F_OK), 0);
  EXPECT_EQ(exit_code(run_refitd({"--config", file_, "--check-config"})), 0);
}

TEST_F(Configured, CheckConfigNamesEveryErrorAndEndsWithSix) {
  write("verbos = true\n[limits]\nsessions_per_uid = 0\n");
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--check-config", file_}, {"--config", file_, "--check-config"}}) {
    const ProgramEnd sut = run_refitd(arguments);
    EXPECT_EQ(exit_code(sut), 6);
    expect_has(sut.output, file_ + ":1:1: unknown key 'verbos'; did you mean verbose?");
    expect_has(sut.output, file_ + ":3:20: limits.sessions_per_uid is an integer from 1 to");
  }
}

TEST_F(Configured, FileThatCannotBeReadIsBadConfiguration) {
  for (const std::string& path : {directory_.path() + "/absent.toml", directory_.path()}) {
    const ProgramEnd checked = run_refitd({"--check-config", path});
    EXPECT_EQ(exit_code(checked), 6);
    expect_has(checked.output, path);
    const ProgramEnd started = run_refitd({"--socket", socket_, "--config", path});
    EXPECT_EQ(exit_code(started), 6);
    expect_has(started.output, path);
  }
  ASSERT_EQ(::mkfifo(file_.c_str(), 0600), 0);
  EXPECT_EQ(exit_code(run_refitd({"--check-config", file_})), 6);
  EXPECT_EQ(exit_code(run_refitd({"--check-config", "/dev/zero"})), 6);
  EXPECT_EQ(exit_code(run_refitd({"--check-config", "/dev/null"})), 0);
}

TEST_F(Configured, DaemonDoesNotStartOnABadFile) {
  write("nonsense = 1\n");
  const ProgramEnd sut = run_refitd({"--socket", socket_, "--config", file_});
  EXPECT_EQ(exit_code(sut), 6);
  expect_has(sut.output, file_ + ":1:1");
  EXPECT_NE(::access(socket_.c_str(), F_OK), 0);
}

TEST_F(Configured, BadFlagsAreBadArgumentsAndNameTheBounds) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"--copy-threads", "257"},
        {"--copy-threads", "-1"},
        {"--waiting", "sometimes"},
        {"--verbose=perhaps"},
        {"--drain-timeout-ms", "soon"}}) {
    const ProgramEnd sut = run_refitd(arguments);
    EXPECT_EQ(exit_code(sut), 2) << arguments.front() << sut.output;
  }
  expect_has(run_refitd({"--copy-threads", "257"}).output, "an integer from 0 to 256");
}

TEST_F(Configured, PermissionEndsWithFour) {
  if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can start a daemon of another uid";
  OtherUser sut(65534, {65534}, [&](OtherUser::Talk& talk) {
    // The directory is root's, mode 0700.
    const ProgramEnd end = run_refitd({"--socket", socket_});
    talk.say(std::to_string(exit_code(end)) + " " + end.output);
  });
  const std::string answer = sut.hear();
  EXPECT_EQ(answer.rfind("4 ", 0), 0U) << answer;
  expect_has(answer, socket_);
}

TEST_F(Configured, PrintConfigShowsEachValueWithItsOrigin) {
  write("copy_threads = 3\ndrain_timeout_ms = 5\n[limits]\nsessions_per_uid = 9\n");
  const ProgramEnd sut =
      run_refitd({"--config", file_, "--drain-timeout-ms", "7", "-v", "--print-config"});
  EXPECT_EQ(exit_code(sut), 0);
  const auto line_of = [&](const std::string& key) {
    const auto begin = sut.output.find(key + " = ");
    return sut.output.substr(begin, sut.output.find('\n', begin) - begin);
  };
  expect_has(line_of("copy_threads"), "= 3 ");
  expect_has(line_of("copy_threads"), "# " + file_ + ":1");
  expect_has(line_of("drain_timeout_ms"), "= 7 ");
  expect_has(line_of("drain_timeout_ms"), "# --drain-timeout-ms");
  expect_has(line_of("verbose"), "= true");
  expect_has(line_of("verbose"), "# --verbose");
  expect_has(line_of("sessions_per_uid"), "# " + file_ + ":4");
  expect_has(line_of("check_threads"), "# built in");
}

TEST_F(Configured, HelpListsEveryFlagAndExitCode) {
  const ProgramEnd sut = run_refitd({"--help"});
  EXPECT_EQ(exit_code(sut), 0);
  for (const char* part :
       {"--config", "--check-config", "--print-config", "--copy-threads", "--drain-timeout-ms",
        "--verbose", "Exit codes", "6  bad configuration", "SIGHUP", "refitd.toml(5)"}) {
    expect_has(sut.output, part);
  }
  EXPECT_EQ(sut.output.find("print-reference"), std::string::npos);
}

// Goal: an operator's reload takes what is live, names what needs a restart, and holds from the
// next request on. Method: a limit of two sessions becomes one of three.
TEST_F(Configured, ReloadChangesALimitAndNamesWhatNeedsARestart) {
  write("[limits]\nsessions_per_uid = 2\n");
  start();
  Observer sut = observer();
  Trainer trainer = must(Trainer::connect("one", {socket_}, soon()));
  const auto refused = Trainer::connect("two", {socket_}, soon());
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().code, Errc::quota);
  expect_has(refused.error().message, "2 of 2 sessions");
  expect_has(refused.error().message, "limits.sessions_per_uid in " + file_);

  write("copy_threads = 7\n[limits]\nsessions_per_uid = 3\n");
  const ReloadReport report = must(sut.reload(soon()));
  EXPECT_EQ(report.file, file_);
  EXPECT_EQ(report.changed, (std::vector<std::string>{"limits.sessions_per_uid"}));
  EXPECT_EQ(report.needs_restart, (std::vector<std::string>{"copy_threads"}));
  EXPECT_TRUE(Trainer::connect("two", {socket_}, soon()));
}

// Goal: a bad file changes nothing and its errors reach whoever asked.
TEST_F(Configured, ReloadOfABadFileKeepsTheOldAndSaysWhy) {
  write("[limits]\nsessions_per_uid = 2\n");
  start();
  Observer sut = observer();
  write("[limits]\nsessions_per_uid = 64\nsesions_per_uid = 5\n");
  const auto report = sut.reload(soon());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, Errc::bad_configuration);
  ASSERT_EQ(report.error().details.size(), 1U);
  expect_has(report.error().details.front(), file_ + ":3:1: unknown key");
  Trainer trainer = must(Trainer::connect("one", {socket_}, soon()));
  EXPECT_FALSE(Trainer::connect("two", {socket_}, soon()));
}

TEST_F(Configured, FlagsGoBeforeTheFileAfterAReloadToo) {
  write("drain_timeout_ms = 5\n");
  start({"--drain-timeout-ms", "7"});
  write("drain_timeout_ms = 6\n");
  EXPECT_TRUE(must(observer().reload(soon())).changed.empty());
}

TEST_F(Configured, ReloadIsForRootAndTheDaemonsOwnUid) {
  if (::getuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can be somebody else";
  write("");
  start();
  ASSERT_EQ(::chmod(directory_.path().c_str(), 0755), 0);
  ASSERT_EQ(::chmod(socket_.c_str(), 0666), 0);
  OtherUser sut(65534, {65534}, [&](OtherUser::Talk& talk) {
    const auto report = observer().reload(soon());
    talk.say(report ? "ok" : report.error().to_string());
  });
  const std::string answer = sut.hear();
  EXPECT_EQ(answer.rfind("permission: uid 65534 may not reload", 0), 0U) << answer;
  EXPECT_TRUE(observer().reload(soon()));
}

/// A datagram socket as systemd's notification socket.
class NotifySocket {
 public:
  explicit NotifySocket(const std::string& path)
      : fd_(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    EXPECT_EQ(::bind(fd_, reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
    ::setenv("NOTIFY_SOCKET", path.c_str(), 1);
  }
  ~NotifySocket() {
    ::unsetenv("NOTIFY_SOCKET");
    ::close(fd_);
  }
  NotifySocket(const NotifySocket&) = delete;
  NotifySocket& operator=(const NotifySocket&) = delete;
  /// The next message; empty after a bound.
  std::string next() const {
    pollfd entry{fd_, POLLIN, 0};
    char text[512] = {};
    if (::poll(&entry, 1, 20'000) == 1) [[maybe_unused]]
      const auto bytes = ::recv(fd_, text, sizeof text - 1, 0);
    return text;
  }

 private:
  int fd_;
};

// Goal: systemd always learns that a reload is over, also of a bad file. Method: be its
// notification socket, and send SIGHUP with a good and with a bad file.
TEST_F(Configured, SighupReloadsAndTellsSystemdOnEveryWay) {
  const NotifySocket notify(directory_.path() + "/notify");
  write("[limits]\nsessions_per_uid = 1\n");
  start();
  expect_has(notify.next(), "READY=1");
  for (const char* text : {"[limits]\nsessions_per_uid = 5\n", "nonsense = 1\n"}) {
    write(text);
    daemon_->send_signal(SIGHUP);
    const std::string begun = notify.next();
    expect_has(begun, "RELOADING=1");
    expect_has(begun, "MONOTONIC_USEC=");
    expect_has(notify.next(), "READY=1");
  }
  // The good file holds.
  Observer one = observer();
  Observer two = observer();
  EXPECT_TRUE(two.status(soon()));
}

}  // namespace
}  // namespace refit::test
