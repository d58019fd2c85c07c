// NotifySocket: stands in for systemd, so that a test sees whether a daemon pings its watchdog.
//
// One thread of its own reads the socket: one that nobody reads is full after ten messages, and
// then blocks the daemon.
#pragma once

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <string>
#include <string_view>
#include <thread>

#include "support/eventually.hpp"

namespace refit::test {

class NotifySocket {
 public:
  explicit NotifySocket(const std::string& path) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (path.size() >= sizeof address.sun_path) std::abort();
    std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
    socket_ = ::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (::bind(socket_, reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
      std::abort();
    reader_ = std::thread([this] { read_messages(); });
  }
  /// The daemon has ended.
  ~NotifySocket() {
    ::shutdown(socket_, SHUT_RDWR);
    reader_.join();
    ::close(socket_);
  }
  NotifySocket(const NotifySocket&) = delete;
  NotifySocket& operator=(const NotifySocket&) = delete;

  /// Waits for so many more pings; false if they do not come.
  bool pings(int count) {
    const int before = pings_.load();
    return eventually([&] { return pings_.load() >= before + count; });
  }
  /// True once no ping came for several times `period`.
  bool pings_stop(std::chrono::milliseconds period) {
    return eventually([&] {
      const int before = pings_.load();
      std::this_thread::sleep_for(5 * period);
      return pings_.load() == before;
    });
  }

 private:
  void read_messages() {
    char text[1024];
    for (;;) {
      const ssize_t bytes = ::recv(socket_, text, sizeof text, 0);
      if (bytes <= 0) return;
      if (std::string_view(text, static_cast<std::size_t>(bytes)) == "WATCHDOG=1") ++pings_;
    }
  }

  int socket_ = -1;
  std::atomic<int> pings_{0};
  std::thread reader_;
};

}  // namespace refit::test
