#include "server/listener.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <systemd/sd-daemon.h>

#include <cerrno>
#include <cstring>

namespace refit::daemon {

Result<Listener> Listener::bind(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(Errc::bad_argument, "the socket path is longer than " +
                                        std::to_string(sizeof address.sun_path - 1) +
                                        " bytes: " + path);
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);

  Listener listener;
  const std::string lock_path = path + ".lock";
  listener.lock_ =
      UniqueFd::adopt(::open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!listener.lock_) return fail_os("opening " + lock_path, errno);
  if (::flock(listener.lock_.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EWOULDBLOCK) {
      return fail(Errc::already_running,
                  "another refitd serves " + path + "; stop it or choose another --socket");
    }
    return fail_os("locking " + lock_path, errno);
  }
  struct stat status {};
  if (::lstat(path.c_str(), &status) == 0) {
    if (!S_ISSOCK(status.st_mode))
      return fail(Errc::bad_argument, path + " exists and is not a socket");
    // We hold the lock, so whoever made it is dead.
    if (::unlink(path.c_str()) != 0) return fail_os("removing the stale socket " + path, errno);
  }
  UniqueFd socket =
      UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return fail_os("socket", errno);
  const mode_t old_mask = ::umask(0117);
  const int bound =
      ::bind(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address);
  const int code = errno;
  ::umask(old_mask);
  if (bound != 0) return fail_os("binding " + path, code);
  listener.path_ = path;
  if (::listen(socket.get(), 64) != 0) return fail_os("listening on " + path, errno);
  listener.socket_ = std::move(socket);
  return listener;
}

Result<Listener> Listener::from_systemd() {
  const int count = ::sd_listen_fds(1);
  if (count < 0) return fail_os("reading the sockets that systemd passed", -count);
  Listener listener;
  for (int fd = SD_LISTEN_FDS_START; fd < SD_LISTEN_FDS_START + count; ++fd) {
    UniqueFd owned = UniqueFd::adopt(fd);
    if (!listener.socket_ && ::sd_is_socket(fd, AF_UNIX, SOCK_SEQPACKET, 1) > 0) {
      ::fcntl(fd, F_SETFL, ::fcntl(fd, F_GETFL) | O_NONBLOCK);
      listener.socket_ = std::move(owned);
    }
  }
  if (!listener.socket_) {
    return fail(
        Errc::bad_argument,
        count == 0
            ? "no socket: name one with --socket PATH, or start through systemd's refitd.socket"
            : "systemd passed no listening AF_UNIX SOCK_SEQPACKET socket "
              "(ListenSequentialPacket=)");
  }
  return listener;
}

Listener::~Listener() {
  // The lock file stays: removing it would let two daemons hold locks on two files of one name.
  if (!path_.empty() && socket_) ::unlink(path_.c_str());
}

}  // namespace refit::daemon
