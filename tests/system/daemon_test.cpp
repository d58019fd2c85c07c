// The daemon as systemd and an operator meet it: socket activation, readiness, options, exit codes.
//
// Each test starts the real binary as its own child. No systemd is needed: activation and readiness
// are an inherited fd, two environment variables and a datagram.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <string>

#include "posix/unique_fd.hpp"
#include "refit/observer.hpp"
#include "support/daemon_process.hpp"
#include "support/must.hpp"
#include "support/program.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

UniqueFd bind_socket(int type, const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  UniqueFd socket = UniqueFd::adopt(::socket(AF_UNIX, type | SOCK_CLOEXEC, 0));
  EXPECT_EQ(::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  return socket;
}

/// The exit code of a program that ended by itself; -1 if a signal ended it.
int exit_code(const ProgramEnd& end) {
  return WIFEXITED(end.status) ? WEXITSTATUS(end.status) : -1;
}

// Goal: the daemon serves a socket that systemd opened, says when it is ready, and leaves the
// socket file alone. Method: play systemd: pass the listening socket as fd 3, wait for the READY=1
// datagram, connect, stop, look at the file.
TEST(Daemon, ServesASocketThatItInheritsAndReportsReadiness) {
  const TemporaryDirectory directory;
  const std::string socket_path = directory.path() + "/refitd.sock";
  const std::string notify_path = directory.path() + "/notify";
  const UniqueFd listener = bind_socket(SOCK_SEQPACKET, socket_path);
  ASSERT_EQ(::listen(listener.get(), 8), 0);
  const UniqueFd notify = bind_socket(SOCK_DGRAM, notify_path);

  const pid_t child = ::fork();
  if (child == 0) {
    // dup2 onto the same number would keep CLOEXEC.
    const int high = ::fcntl(listener.get(), F_DUPFD, 64);
    ::dup2(high, 3);
    ::setenv("LISTEN_FDS", "1", 1);
    ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
    ::setenv("NOTIFY_SOCKET", notify_path.c_str(), 1);
    ::execl(REFITD_PATH, REFITD_PATH, nullptr);
    ::_exit(127);
  }
  pollfd ready{notify.get(), POLLIN, 0};
  ASSERT_EQ(::poll(&ready, 1, 20'000), 1) << "no readiness message";
  char text[512] = {};
  ASSERT_GT(::recv(notify.get(), text, sizeof text - 1, 0), 0);
  EXPECT_NE(std::string(text).find("READY=1"), std::string::npos) << text;

  Observer sut = must(Observer::connect("test", {socket_path}, Deadline::in(10s)));
  const DaemonStatus status = must(sut.status(Deadline::in(10s)));
  EXPECT_EQ(status.pid, static_cast<std::uint32_t>(child));

  ::kill(child, SIGTERM);
  int outcome = 0;
  ASSERT_EQ(::waitpid(child, &outcome, 0), child);
  EXPECT_TRUE(WIFEXITED(outcome) && WEXITSTATUS(outcome) == 0) << outcome;
  EXPECT_EQ(::access(socket_path.c_str(), F_OK), 0) << "a socket of systemd's was removed";
}

TEST(Daemon, RemovesItsOwnSocketOnTermination) {
  const TemporaryDirectory directory;
  const std::string socket_path = directory.path() + "/refitd.sock";
  DaemonProcess sut(socket_path);
  sut.send_signal(SIGTERM);
  const auto status = sut.wait_end(20'000);
  ASSERT_TRUE(status);
  EXPECT_TRUE(WIFEXITED(*status) && WEXITSTATUS(*status) == 0) << *status;
  EXPECT_NE(::access(socket_path.c_str(), F_OK), 0);
}

TEST(Daemon, HelpTeachesAndExitsWithZero) {
  const ProgramEnd sut = run_refitd({"--help"});
  EXPECT_EQ(exit_code(sut), 0);
  EXPECT_NE(sut.output.find("--socket"), std::string::npos);
  EXPECT_NE(sut.output.find("--waiting"), std::string::npos);
}

TEST(Daemon, VersionNamesProtocolAndLayout) {
  const ProgramEnd sut = run_refitd({"--version"});
  EXPECT_EQ(exit_code(sut), 0);
  EXPECT_NE(sut.output.find("protocol 3"), std::string::npos);
  EXPECT_NE(sut.output.find("layout "), std::string::npos);
}

TEST(Daemon, UnknownOptionExitsWithTwo) {
  EXPECT_EQ(exit_code(run_refitd({"--no-such-option"})), 2);
}

TEST(Daemon, WithoutAnySocketSaysHowToGetOne) {
  const ProgramEnd sut = run_refitd({});
  EXPECT_EQ(exit_code(sut), 2);
  EXPECT_NE(sut.output.find("--socket"), std::string::npos) << sut.output;
}

TEST(Daemon, DirectoryThatIsNotThereIsNamed) {
  const ProgramEnd sut = run_refitd({"--socket", "/no/such/directory/refitd.sock"});
  EXPECT_EQ(exit_code(sut), 1);
  EXPECT_NE(sut.output.find("/no/such/directory"), std::string::npos) << sut.output;
}

}  // namespace
}  // namespace refit::test
