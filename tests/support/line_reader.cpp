#include "support/line_reader.hpp"

#include <poll.h>
#include <unistd.h>

#include <cerrno>

namespace refit::test {

LineReader::~LineReader() {
  if (fd_ >= 0) ::close(fd_);
}

std::string LineReader::next() {
  constexpr int kBoundMs = 30'000;
  for (;;) {
    const auto end = unread_.find('\n');
    if (end != std::string::npos) {
      std::string line = unread_.substr(0, end);
      unread_.erase(0, end + 1);
      return line;
    }
    pollfd entry{fd_, POLLIN, 0};
    const int count = ::poll(&entry, 1, kBoundMs);
    if (count == 0) return "silence";
    char buffer[4096];
    const ssize_t bytes = ::read(fd_, buffer, sizeof buffer);
    if (bytes < 0 && errno == EINTR) continue;
    if (bytes <= 0) return "gone";
    unread_.append(buffer, static_cast<std::size_t>(bytes));
  }
}

}  // namespace refit::test
