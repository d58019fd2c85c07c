// Doorbell: what wakes the peer. Any thread may ring; ringing never blocks.
//
// An eventfd, or the two ends of a pipe where the peer that listens is not trusted: O_NONBLOCK
// belongs to the file description, so whoever holds the same eventfd can take it away, fill the
// counter and block the one who rings. A pipe's ends are two descriptions.
#pragma once

#include <fcntl.h>
#include <sys/eventfd.h>

#include <array>
#include <cerrno>
#include <cstdint>

#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit {

class Doorbell {
 public:
  Doorbell() noexcept = default;
  static Result<Doorbell> create() {
    Doorbell doorbell;
    doorbell.fd_ = UniqueFd::adopt(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!doorbell.fd_) return fail_os("eventfd", errno);
    return doorbell;
  }
  /// @param bell  the end that becomes readable; for the peer.
  static Result<Doorbell> create_for_peer(UniqueFd& bell) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return fail_os("pipe2", errno);
    bell = UniqueFd::adopt(ends[0]);
    return adopt(UniqueFd::adopt(ends[1]));
  }
  static Doorbell adopt(UniqueFd fd) noexcept {
    Doorbell doorbell;
    doorbell.fd_ = std::move(fd);
    return doorbell;
  }

  /// A counter or pipe that is full (EAGAIN) is as good as rung.
  void ring() const noexcept {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd_.get(), &one, sizeof one);
  }
  /// Makes the fd unreadable again until the next ring.
  void drain() const noexcept {
    std::array<std::byte, 4096> rings;
    while (::read(fd_.get(), rings.data(), rings.size()) == static_cast<ssize_t>(rings.size())) {
    }
  }
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }

 private:
  UniqueFd fd_;
};

}  // namespace refit
