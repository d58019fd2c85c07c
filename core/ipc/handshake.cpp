#include "ipc/handshake.hpp"

#include <sys/socket.h>

#include <array>
#include <cerrno>
#include <cstring>

namespace refit {

Result<void> send_message(int socket, SocketMessage kind, const void* body, std::size_t body_bytes,
                          const int* fds, std::size_t fd_count) {
  Preamble preamble;
  preamble.kind = static_cast<std::uint16_t>(kind);
  iovec parts[2] = {{&preamble, sizeof preamble}, {const_cast<void*>(body), body_bytes}};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = body_bytes == 0 ? 1 : 2;
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int) * kSocketFdsMax)> control{};
  if (fd_count > kSocketFdsMax) return fail(Errc::bad_argument, "too many fds for one message");
  if (fd_count > 0) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(sizeof(int) * fd_count);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int) * fd_count);
    std::memcpy(CMSG_DATA(header), fds, sizeof(int) * fd_count);
  }
  for (;;) {
    if (::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT) >= 0) return {};
    if (errno != EINTR) return fail_os("sendmsg on the daemon's socket", errno);
  }
}

Receive receive_message(int socket, ReceivedMessage& out) {
  out.body.resize(kSocketMessageBytesMax);
  out.fds.clear();
  iovec parts[2] = {{&out.preamble, sizeof out.preamble}, {out.body.data(), out.body.size()}};
  alignas(cmsghdr) std::array<std::byte, CMSG_SPACE(sizeof(int) * kSocketFdsMax)> control{};
  msghdr message{};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t received = 0;
  do {
    received = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    // A peer that closed without reading what we sent leaves ECONNRESET, once, before its own last
    // message: the reason why it refused us.
  } while (received < 0 && (errno == EINTR || errno == ECONNRESET));
  if (received < 0) {
    return errno == EAGAIN || errno == EWOULDBLOCK ? Receive::nothing_yet : Receive::closed;
  }
  // Own every fd that arrived before judging anything, so that a refused message leaks none.
  for (cmsghdr* header = CMSG_FIRSTHDR(&message); header != nullptr;
       header = CMSG_NXTHDR(&message, header)) {
    if (header->cmsg_level != SOL_SOCKET || header->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (header->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(header) + i * sizeof(int), sizeof fd);
      out.fds.push_back(UniqueFd::adopt(fd));
    }
  }
  if (received == 0) return Receive::closed;
  const bool truncated = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0;
  if (truncated || static_cast<std::size_t>(received) < sizeof(Preamble) ||
      out.preamble.magic != kMagic) {
    return Receive::peer_broke_protocol;
  }
  out.body.resize(static_cast<std::size_t>(received) - sizeof(Preamble));
  return Receive::message;
}

}  // namespace refit
