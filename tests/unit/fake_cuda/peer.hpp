// Peer: another process with a driver of its own, that does what a test tells it.
//
// It runs peer_main.cpp by fork and exec. Questions and answers are packets of fixed size on a
// socket, with at most one fd. One thread.
#pragma once

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "unit/fake_cuda/cuda_api.hpp"

namespace fakecuda::test {

enum class Order : std::uint32_t {
  resolve,       ///< text: name; number: version. value: what of CUdriverProcAddressQueryResult
  device_count,  ///< value
  retain,        ///< the primary context of device `number`
  open_memory,   ///< handle; kept
  open_event,    ///< handle
  import_fd,     ///< the fd; `bytes` of it are mapped, and kept
  read_kept,     ///< value: the first byte of what is kept
  close_kept,
  wait_event,   ///< on the event that was opened
  export_both,  ///< allocates `bytes` of `number`; answer: handle of memory and event, and an fd
  record,  ///< fills what export_both made with `number`, and records its event, without waiting
  free_export,
  refit  ///< see refit.hpp
};

struct Question {
  Order order = Order::device_count;
  std::uint64_t number = 0;
  std::uint64_t bytes = 0;
  char text[64] = {};
  char schedule[16] = "lazy";
  CUipcMemHandle memory{};
  CUipcEventHandle event{};
};

struct Answer {
  int result = 0;  ///< of the call that the order is about
  std::uint64_t value = 0;
  std::uint64_t violations = 0;
  CUipcMemHandle memory{};
  CUipcEventHandle event{};
};

/// Sends one packet, with an fd if it is not -1.
template <typename Packet>
bool send_packet(int socket, const Packet& packet, int fd = -1) {
  iovec part{const_cast<Packet*>(&packet), sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof fd);
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == sizeof packet;
}

/// False at the end of the connection. `fd` is -1 if none came.
template <typename Packet>
bool receive_packet(int socket, Packet& packet, int& fd) {
  iovec part{&packet, sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof fd)] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  fd = -1;
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != sizeof packet) return false;
  if (const cmsghdr* header = CMSG_FIRSTHDR(&message))
    std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return true;
}

using Environment = std::map<std::string, std::string>;

/// fork and exec of the peer program; `socket` becomes its fd 3 if it is not -1.
inline pid_t start_peer_program(const std::vector<std::string>& arguments,
                                const Environment& environment, int socket) {
  std::vector<std::string> words{FAKE_CUDA_PEER_PATH};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
  // Else each peer sleeps a second when it ends.
  const char* options = ::getenv("TSAN_OPTIONS");
  const std::string quick = std::string(options == nullptr ? "" : options) + " atexit_sleep_ms=0";
  ::setenv("TSAN_OPTIONS", quick.c_str(), 1);
  if (socket >= 0) ::dup2(socket, 3);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

/// How the peer program ends when it is run for itself: see peer_main.cpp.
inline int run_peer_program(const std::vector<std::string>& arguments,
                            const Environment& environment = {}) {
  int status = 0;
  ::waitpid(start_peer_program(arguments, environment, -1), &status, 0);
  return status;
}

class Peer {
 public:
  /// `uid`: who it becomes before it loads the driver; 0 for nobody else.
  explicit Peer(const Environment& environment = {}, unsigned int uid = 0) {
    int ends[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
    pid_ = start_peer_program({"serve", std::to_string(uid)}, environment, ends[1]);
    ::close(ends[1]);
    socket_ = ends[0];
  }
  ~Peer() { end(); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }
  void tell(const Question& question, int fd = -1) const { send_packet(socket_, question, fd); }
  /// result is -1 if the peer is gone.
  Answer hear(int* fd = nullptr) const {
    Answer answer;
    int received = -1;
    if (!receive_packet(socket_, answer, received)) answer.result = -1;
    if (fd != nullptr) {
      *fd = received;
    } else if (received >= 0) {
      ::close(received);
    }
    return answer;
  }
  Answer ask(const Question& question, int fd = -1, int* received = nullptr) const {
    tell(question, fd);
    return hear(received);
  }
  void send_signal(int signal) const { ::kill(pid_, signal); }
  void kill_now() {
    send_signal(SIGKILL);
    end();
  }
  /// Lets it end by itself; returns waitpid's status.
  int end() {
    int status = 0;
    if (socket_ >= 0) ::close(socket_);
    if (pid_ > 0) ::waitpid(pid_, &status, 0);
    socket_ = -1;
    pid_ = -1;
    return status;
  }

 private:
  pid_t pid_ = -1;
  int socket_ = -1;
};

}  // namespace fakecuda::test
