// JSON messages with fds over a socketpair. See channel.hpp.
//
// One thread per end. Must not be used while anything is timed.
#include "channel.hpp"

#include <poll.h>
#include <sys/socket.h>

#include <cerrno>
#include <cstdint>
#include <cstring>

namespace refit::bench {
namespace {

Unexpected closed() {
  return fail(Errc::engine_gone, "a process of the benchmark closed its end of the channel");
}

}  // namespace

Result<std::pair<Channel, Channel>> Channel::make_pair() {
  int fds[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) != 0)
    return fail_os("socketpair", errno);
  return std::pair(Channel(UniqueFd::adopt(fds[0])), Channel(UniqueFd::adopt(fds[1])));
}

Result<void> Channel::send(const nlohmann::json& body, int fd) {
  const std::string text = body.dump();
  std::uint64_t length = text.size();
  iovec header{&length, sizeof length};
  msghdr message{};
  message.msg_iov = &header;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* part = CMSG_FIRSTHDR(&message);
    part->cmsg_level = SOL_SOCKET;
    part->cmsg_type = SCM_RIGHTS;
    part->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(part), &fd, sizeof fd);
  }
  if (::sendmsg(socket_.get(), &message, MSG_NOSIGNAL) != static_cast<ssize_t>(sizeof length)) {
    return fail_os("sendmsg", errno);
  }
  for (std::size_t sent = 0; sent < text.size();) {
    const ssize_t count =
        ::send(socket_.get(), text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (count < 0) {
      if (errno == EINTR) continue;
      return fail_os("send", errno);
    }
    sent += static_cast<std::size_t>(count);
  }
  return {};
}

Result<std::optional<Message>> Channel::receive(std::chrono::milliseconds timeout) {
  pollfd wait{socket_.get(), POLLIN, 0};
  const int ready = ::poll(&wait, 1, static_cast<int>(timeout.count()));
  if (ready < 0 && errno != EINTR) return fail_os("poll", errno);
  if (ready <= 0) return std::optional<Message>();

  std::uint64_t length = 0;
  iovec header{&length, sizeof length};
  msghdr message{};
  message.msg_iov = &header;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  const ssize_t got = ::recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC | MSG_WAITALL);
  if (got == 0) return closed();
  if (got != static_cast<ssize_t>(sizeof length)) return fail_os("recvmsg", errno);
  Message result;
  const cmsghdr* part = CMSG_FIRSTHDR(&message);
  if (part != nullptr && part->cmsg_type == SCM_RIGHTS) {
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(part), sizeof fd);
    result.fd = UniqueFd::adopt(fd);
  }
  std::string text(length, '\0');
  for (std::size_t read = 0; read < length;) {
    const ssize_t count = ::recv(socket_.get(), text.data() + read, length - read, 0);
    if (count == 0) return closed();
    if (count < 0) {
      if (errno == EINTR) continue;
      return fail_os("recv", errno);
    }
    read += static_cast<std::size_t>(count);
  }
  result.body = nlohmann::json::parse(text, nullptr, false);
  return std::optional<Message>(std::move(result));
}

}  // namespace refit::bench
