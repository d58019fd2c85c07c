// DaemonProcess: a real refitd on a private socket in a private directory, for tests.
//
// Owns the process by pidfd-free means: it is our own child, waited for by pid. Everything is gone
// when the object is.
#pragma once

#include <sys/types.h>

#include <map>
#include <optional>
#include <string>
#include <vector>

namespace refit::test {

struct DaemonOptions {
  bool test_build = false;                         ///< refitd_test, with its named points
  std::string point;                               ///< REFIT_POINT, e.g. "writing.begun=kill"
  std::vector<std::string> arguments;              ///< besides --socket
  std::map<std::string, std::string> environment;  ///< beside this process's own
};

/// A directory that is removed with everything in it.
class TemporaryDirectory {
 public:
  TemporaryDirectory();
  ~TemporaryDirectory();
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

class DaemonProcess {
 public:
  /// Starts refitd and waits until its socket is there. Fails the calling test otherwise.
  explicit DaemonProcess(const std::string& socket, const DaemonOptions& options = {});
  ~DaemonProcess();
  DaemonProcess(const DaemonProcess&) = delete;
  DaemonProcess& operator=(const DaemonProcess&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  void send_signal(int signal) const;
  /// Waits for the process to end; returns waitpid's status, or nullopt after `timeout_ms`.
  std::optional<int> wait_end(int timeout_ms);
  /// Waits until the process is stopped (state T); false after `timeout_ms`.
  bool wait_stopped(int timeout_ms);
  /// Kills it and waits.
  void kill_now();

 private:
  pid_t pid_ = -1;
};

/// Number of open fds, and of mapped files and memfds, of a process: what a leak shows in. Memory
/// that is no file's is its allocator's or a sanitizer's, and comes and goes as they like.
std::size_t count_fds(pid_t pid);
std::size_t count_maps(pid_t pid);
/// The fds once there are as many for a while: a daemon closes those of a client that went, and of
/// its own start, some time later.
std::size_t settled_fds(pid_t pid);

}  // namespace refit::test
