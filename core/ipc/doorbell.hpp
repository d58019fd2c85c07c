// Doorbell: an eventfd that wakes the peer. Any thread may ring; non-blocking on both sides.
#pragma once

#include <sys/eventfd.h>

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
  static Doorbell adopt(UniqueFd fd) noexcept {
    Doorbell doorbell;
    doorbell.fd_ = std::move(fd);
    return doorbell;
  }

  /// A counter that is full (EAGAIN) is as good as rung.
  void ring() const noexcept {
    const std::uint64_t one = 1;
    [[maybe_unused]] const auto written = ::write(fd_.get(), &one, sizeof one);
  }
  /// Makes the fd unreadable again until the next ring.
  void drain() const noexcept {
    std::uint64_t count = 0;
    [[maybe_unused]] const auto read_bytes = ::read(fd_.get(), &count, sizeof count);
  }
  [[nodiscard]] int fd() const noexcept { return fd_.get(); }

 private:
  UniqueFd fd_;
};

}  // namespace refit
