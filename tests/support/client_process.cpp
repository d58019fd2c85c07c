#include "support/client_process.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

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
  from_.adopt(answers[0]);
  EXPECT_EQ(hear(), "ok ready") << REFIT_PEER_PATH << " did not start";
}

ClientProcess::~ClientProcess() {
  kill_now();
  ::close(to_);
}

void ClientProcess::tell(const std::string& command) {
  const std::string line = command + "\n";
  EXPECT_EQ(::write(to_, line.data(), line.size()), static_cast<ssize_t>(line.size())) << command;
}

std::string ClientProcess::hear() { return from_.next(); }

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
