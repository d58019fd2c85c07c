#include "support/daemon_process.hpp"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <utility>

#include "support/eventually.hpp"

namespace refit::test {
namespace {

template <typename Condition>
bool eventually(int timeout_ms, Condition&& condition) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  while (std::chrono::steady_clock::now() < end) {
    if (condition()) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return condition();
}

bool listens(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(),
              std::min(path.size() + 1, sizeof address.sun_path - 1));
  const int fd = ::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
  const bool connected =
      ::connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof address) == 0;
  ::close(fd);
  return connected;
}

}  // namespace

TemporaryDirectory::TemporaryDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "refit-test-XXXXXX").string();
  path_ = ::mkdtemp(pattern.data());
}

TemporaryDirectory::~TemporaryDirectory() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

DaemonProcess::DaemonProcess(const std::string& socket, const DaemonOptions& options) {
  const std::string binary = options.test_build ? REFITD_TEST_PATH : REFITD_PATH;
  std::vector<std::string> words{binary, "--socket", socket};
  words.insert(words.end(), options.arguments.begin(), options.arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t parent = ::getpid();
  pid_ = ::fork();
  if (pid_ == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (::getppid() != parent) ::_exit(1);
    if (!options.point.empty()) ::setenv("REFIT_POINT", options.point.c_str(), 1);
    for (const auto& [name, value] : options.environment) ::setenv(name.c_str(), value.c_str(), 1);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  const bool up = eventually(20'000, [&] { return listens(socket); });
  EXPECT_TRUE(up) << binary << " does not listen at " << socket;
}

DaemonProcess::~DaemonProcess() { kill_now(); }

void DaemonProcess::send_signal(int signal) const { ::kill(pid_, signal); }

std::optional<int> DaemonProcess::wait_end(int timeout_ms) {
  int status = 0;
  const bool ended =
      eventually(timeout_ms, [&] { return pid_ > 0 && ::waitpid(pid_, &status, WNOHANG) == pid_; });
  if (!ended) return std::nullopt;
  pid_ = -1;
  return status;
}

bool DaemonProcess::wait_stopped(int timeout_ms) {
  return eventually(timeout_ms, [&] {
    siginfo_t info{};
    return ::waitid(P_PID, static_cast<id_t>(pid_), &info, WSTOPPED | WNOHANG | WNOWAIT) == 0 &&
           info.si_code == CLD_STOPPED;
  });
}

void DaemonProcess::kill_now() {
  if (pid_ <= 0) return;
  ::kill(pid_, SIGKILL);
  ::waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

std::size_t count_fds(pid_t pid) {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry :
       std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/fd"))
    ++count;
  return count;
}

std::size_t count_maps(pid_t pid) {
  std::ifstream maps("/proc/" + std::to_string(pid) + "/maps");
  std::size_t count = 0;
  for (std::string line; std::getline(maps, line);) count += line.find('/') != line.npos ? 1U : 0U;
  return count;
}

std::size_t settled_fds(pid_t pid) {
  std::size_t fds = 0;
  EXPECT_TRUE(eventually([&] {
    const std::size_t before = std::exchange(fds, count_fds(pid));
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    return fds == before && fds == count_fds(pid);
  }));
  return fds;
}

}  // namespace refit::test
