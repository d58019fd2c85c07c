#include "support/program.hpp"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace refit::test {

ProgramEnd run_refitd(const std::vector<std::string>& arguments) {
  std::vector<std::string> words{REFITD_PATH};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ProgramEnd end;
  int output[2] = {-1, -1};
  if (::pipe2(output, O_CLOEXEC) != 0) return end;
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(output[1], 1);
    ::dup2(output[1], 2);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ::close(output[1]);
  for (;;) {
    constexpr int kBoundMs = 20'000;
    pollfd entry{output[0], POLLIN, 0};
    char buffer[4096];
    if (::poll(&entry, 1, kBoundMs) == 0) ::kill(pid, SIGKILL);
    const ssize_t bytes = ::read(output[0], buffer, sizeof buffer);
    if (bytes <= 0) break;
    end.output.append(buffer, static_cast<std::size_t>(bytes));
  }
  ::close(output[0]);
  ::waitpid(pid, &end.status, 0);
  return end;
}

}  // namespace refit::test
