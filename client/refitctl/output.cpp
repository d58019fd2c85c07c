// Writes finished text to a file descriptor. Any thread. Knows nothing of what the text says.
#include "refitctl/output.hpp"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace refit::ctl {

Result<void> write_all(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written >= 0) {
      text.remove_prefix(static_cast<std::size_t>(written));
      continue;
    }
    if (errno == EINTR) continue;
    if (errno == EPIPE) return {};
    // Whoever started us may share a non-blocking pipe or terminal.
    if (errno == EAGAIN) {
      pollfd ready{fd, POLLOUT, 0};
      (void)::poll(&ready, 1, -1);
      continue;
    }
    const int error = errno;
    return Unexpected(Error{
        Errc::os, error, std::string("cannot write the output: ") + std::strerror(error), {}});
  }
  return {};
}

}  // namespace refit::ctl
