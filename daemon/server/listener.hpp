// Listener: the socket that clients connect to, our own or systemd's.
//
// The loop thread alone. A socket of our own is guarded by a lock file beside it, so that a second
// daemon is refused and a stale socket of a dead one is replaced.
#pragma once

#include <string>

#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit::daemon {

class Listener {
 public:
  /// Binds `path` (mode 0660). Errors: already_running if a daemon serves it, os, bad_argument.
  static Result<Listener> bind(const std::string& path);
  /// The one AF_UNIX SOCK_SEQPACKET socket that systemd passed; others are closed and named in the
  /// error or the log.
  static Result<Listener> from_systemd();

  Listener(Listener&&) noexcept = default;
  Listener& operator=(Listener&&) = delete;
  /// Removes a socket of our own; never one of systemd's.
  ~Listener();

  [[nodiscard]] int fd() const noexcept { return socket_.get(); }
  [[nodiscard]] const std::string& path() const noexcept { return path_; }

 private:
  Listener() = default;
  UniqueFd socket_;
  UniqueFd lock_;
  std::string path_;
};

}  // namespace refit::daemon
