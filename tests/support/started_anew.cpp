#include "support/started_anew.hpp"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>

namespace refit::test {

StartedAnew::StartedAnew(const char* mark, const std::map<std::string, std::string>& more,
                         std::vector<std::string> arguments) {
  int pipe[2] = {-1, -1};
  EXPECT_EQ(::pipe2(pipe, O_CLOEXEC), 0);
  from = UniqueFd::adopt(pipe[0]);
  const UniqueFd to = UniqueFd::adopt(pipe[1]);
  const std::string number = std::to_string(to.get());
  arguments.insert(arguments.begin(), "started_anew");
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  pid_ = ::fork();
  if (pid_ != 0) return;
  ::prctl(PR_SET_PDEATHSIG, SIGKILL);
  ::fcntl(to.get(), F_SETFD, 0);
  // Of the tests of this process: what it was told of its share, and where it reports.
  for (const char* const name : {"GTEST_TOTAL_SHARDS", "GTEST_SHARD_INDEX", "GTEST_OUTPUT"})
    ::unsetenv(name);
  ::setenv(mark, number.c_str(), 1);
  for (const auto& [name, value] : more) ::setenv(name.c_str(), value.c_str(), 1);
  ::execv("/proc/self/exe", argv.data());
  ::_exit(127);
}

void StartedAnew::stop_now() const {
  ::kill(pid_, SIGSTOP);
  ::waitpid(pid_, nullptr, WUNTRACED);
}

void StartedAnew::kill_now() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

}  // namespace refit::test
