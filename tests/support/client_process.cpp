#include "support/client_process.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>

namespace refit::test {

ClientProcess::ClientProcess() {
  int commands[2] = {-1, -1};
  int answers[2] = {-1, -1};
  EXPECT_EQ(::pipe2(commands, O_CLOEXEC), 0);
  EXPECT_EQ(::pipe2(answers, O_CLOEXEC), 0);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    ::dup2(commands[0], 0);
    ::dup2(answers[1], 1);
    char path[] = REFIT_PEER_PATH;
    char* argv[] = {path, nullptr};
    ::execv(path, argv);
    ::_exit(127);
  }
  ::close(commands[0]);
  ::close(answers[1]);
  to_ = commands[1];
  from_ = answers[0];
  EXPECT_EQ(hear(), "ok ready") << REFIT_PEER_PATH << " did not start";
}

ClientProcess::~ClientProcess() {
  kill_now();
  ::close(to_);
  ::close(from_);
}

void ClientProcess::tell(const std::string& command) {
  const std::string line = command + "\n";
  EXPECT_EQ(::write(to_, line.data(), line.size()), static_cast<ssize_t>(line.size())) << command;
}

std::string ClientProcess::hear() {
  constexpr int kBoundMs = 30'000;
  for (;;) {
    const auto end = unread_.find('\n');
    if (end != std::string::npos) {
      std::string line = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      return line;
    }
    pollfd entry{from_, POLLIN, 0};
    const int count = ::poll(&entry, 1, kBoundMs);
    if (count == 0) return "silence";
    char buffer[4096];
    const ssize_t bytes = ::read(from_, buffer, sizeof buffer);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return "gone";
    unread_.append(buffer, static_cast<std::size_t>(bytes));
  }
}

std::string ClientProcess::ask(const std::string& command) {
  tell(command);
  return hear();
}

void ClientProcess::send_signal(int signal) const { ::kill(pid_, signal); }

void ClientProcess::kill_now() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

}  // namespace refit::test
