// Runs a program to its end and keeps what it wrote. One thread.
#include "support/refitctl_system.hpp"

#include <fcntl.h>
#include <poll.h>

#include <array>
#include <cerrno>
#include <csignal>

namespace refit::test {

// Reads from both ends while writing the input, so that no full pipe stops anybody.
Finished run(const std::string& program, const std::vector<std::string>& arguments,
             const RunOptions& options) {
  Finished finished;
  std::array<int, 2> in{}, out{}, err{};
  if (::pipe2(in.data(), O_CLOEXEC) != 0 || ::pipe2(out.data(), O_CLOEXEC) != 0 ||
      ::pipe2(err.data(), O_CLOEXEC) != 0) {
    ADD_FAILURE() << "pipe2: " << std::strerror(errno);
    return finished;
  }
  std::vector<std::string> words = arguments;
  words.insert(words.begin(), program);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  // Opened before rights are dropped: the build folder may be another user's.
  const int binary = ::open(program.c_str(), O_PATH | O_CLOEXEC);

  const pid_t pid = ::fork();
  if (pid == 0) {
    ::dup2(in[0], STDIN_FILENO);
    ::dup2(options.out_fd >= 0 ? options.out_fd : out[1], STDOUT_FILENO);
    ::dup2(options.err_fd >= 0 ? options.err_fd : err[1], STDERR_FILENO);
    std::signal(SIGPIPE, options.default_sigpipe ? SIG_DFL : SIG_IGN);
    for (const char* name : {"REFIT_SOCKET", "NO_COLOR"}) ::unsetenv(name);
    for (const auto& [name, value] : options.environment) ::setenv(name.c_str(), value.c_str(), 1);
    if (options.as_nobody && ::geteuid() == 0 && (::setgid(65534) != 0 || ::setuid(65534) != 0)) {
      ::_exit(126);
    }
    ::fexecve(binary, argv.data(), environ);
    ::_exit(127);
  }
  for (const int fd : {in[0], out[1], err[1], binary}) ::close(fd);
  ::fcntl(in[1], F_SETFL, O_NONBLOCK);

  std::size_t written = 0;
  if (options.input.empty()) {
    ::close(in[1]);
    in[1] = -1;
  }
  std::array<pollfd, 3> fds{{{in[1], POLLOUT, 0}, {out[0], POLLIN, 0}, {err[0], POLLIN, 0}}};
  while (fds[1].fd >= 0 || fds[2].fd >= 0) {
    if (::poll(fds.data(), fds.size(), kPatienceMs) <= 0) {
      ADD_FAILURE() << program << " hangs";
      ::kill(pid, SIGKILL);
      break;
    }
    if (fds[0].fd >= 0 && fds[0].revents != 0) {
      const ssize_t count =
          ::write(in[1], options.input.data() + written, options.input.size() - written);
      if (count > 0) written += static_cast<std::size_t>(count);
      if (written == options.input.size() || (count < 0 && errno != EAGAIN)) {
        ::close(in[1]);
        fds[0].fd = in[1] = -1;
      }
    }
    for (const std::size_t i : {std::size_t{1}, std::size_t{2}}) {
      if (fds[i].fd < 0 || fds[i].revents == 0) continue;
      std::array<char, 65536> buffer;
      const ssize_t count = ::read(fds[i].fd, buffer.data(), buffer.size());
      if (count > 0) {
        (i == 1 ? finished.out : finished.err)
            .append(buffer.data(), static_cast<std::size_t>(count));
      } else {
        fds[i].fd = -1;
      }
    }
  }
  for (const int fd : {in[1], out[0], err[0]}) {
    if (fd >= 0) ::close(fd);
  }
  int status = 0;
  ::waitpid(pid, &status, 0);
  finished.status = WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
  return finished;
}

}  // namespace refit::test
