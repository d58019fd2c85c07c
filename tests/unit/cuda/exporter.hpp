// ExporterProcess: another process that makes device memory and exports it with the code under
// test. exporter_main.cpp is its other end.
//
// It runs by fork and exec, as CUDA wants it. Orders and answers are packets of fixed size; fds
// come with an answer. One thread.
#pragma once

#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "memory/exported.hpp"
#include "unit/cuda/made_memory.hpp"

namespace refit::cuda::test {

inline constexpr std::size_t kPiecesMax = 8;

enum class Act : std::uint32_t {
  make,          ///< memory of `kind`; what there was is freed
  export_range,  ///< `bytes` from `offset` in it
  read,          ///< value: the byte at `offset`
  free,
  make_event,       ///< answer: its handle
  fill_and_record,  ///< all of the memory with byte `offset`, on a stream, without waiting
  destroy_event,
  retain,  ///< the context of device `device`
};

struct Order {
  Act act = Act::make;
  Kind kind = Kind::allocation;
  std::uint64_t bytes = 0;
  std::uint32_t segments = 1;
  int device = 0;
  std::uint64_t offset = 0;
};

struct Answer {
  Errc code = Errc::daemon_gone;  ///< unless the other process says otherwise
  char message[512] = {};
  std::uint64_t value = 0;
  DeviceUuid device;
  RegionKind kind = RegionKind::cuda_legacy;
  std::uint64_t bytes = 0;
  std::uint64_t offset = 0;
  std::uint32_t pieces = 0;
  struct {
    IpcHandle handle{};
    std::uint64_t bytes = 0;
    std::uint64_t allocation_id = 0;
  } piece[kPiecesMax];
  IpcHandle event{};
};

template <typename Packet>
bool send_packet(int socket, const Packet& packet, const std::vector<int>& fds = {}) {
  iovec part{const_cast<Packet*>(&packet), sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(kPiecesMax * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (!fds.empty()) {
    const std::size_t bytes = fds.size() * sizeof(int);
    message.msg_control = control;
    message.msg_controllen = CMSG_SPACE(bytes);
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(bytes);
    std::memcpy(CMSG_DATA(header), fds.data(), bytes);
  }
  return ::sendmsg(socket, &message, MSG_NOSIGNAL) == sizeof packet;
}

/// False at the end of the connection.
template <typename Packet>
bool receive_packet(int socket, Packet& packet, std::vector<UniqueFd>& fds) {
  iovec part{&packet, sizeof packet};
  alignas(cmsghdr) char control[CMSG_SPACE(kPiecesMax * sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (::recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != sizeof packet) return false;
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  for (std::size_t at = CMSG_LEN(0); header != nullptr && at < header->cmsg_len;
       at += sizeof(int)) {
    int fd = -1;
    std::memcpy(&fd, reinterpret_cast<const char*>(header) + at, sizeof fd);
    fds.push_back(UniqueFd::adopt(fd));
  }
  return true;
}

using Environment = std::map<std::string, std::string>;

/// fork and exec of the exporter program; `output` becomes its fd 3.
inline pid_t start_program(std::vector<std::string> words, const Environment& environment,
                           int output) {
  words.insert(words.begin(), REFIT_EXPORTER_PATH);
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const pid_t pid = ::fork();
  if (pid != 0) return pid;
  for (const auto& [name, value] : environment) ::setenv(name.c_str(), value.c_str(), 1);
  ::dup2(output, 3);
  ::execv(argv[0], argv.data());
  ::_exit(127);
}

class ExporterProcess {
 public:
  explicit ExporterProcess(const Environment& environment = {}) {
    int ends[2] = {-1, -1};
    if (::socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) std::abort();
    pid_ = start_program({"serve"}, environment, ends[1]);
    ::close(ends[1]);
    socket_ = UniqueFd::adopt(ends[0]);
  }
  ~ExporterProcess() { static_cast<void>(end()); }
  ExporterProcess(const ExporterProcess&) = delete;
  ExporterProcess& operator=(const ExporterProcess&) = delete;

  [[nodiscard]] pid_t pid() const { return pid_; }

  Answer ask(const Order& order, std::vector<UniqueFd>* fds = nullptr) const {
    Answer answer;
    std::vector<UniqueFd> ignored;
    if (send_packet(socket_.get(), order))
      receive_packet(socket_.get(), answer, fds != nullptr ? *fds : ignored);
    return answer;
  }
  /// Exports `bytes` from `offset` in fresh memory.
  Result<Exported> exported(Kind kind, std::uint64_t segment_bytes, std::uint32_t segments,
                            std::uint64_t offset, std::uint64_t bytes, int device = 0) const {
    const Answer made = ask({Act::make, kind, segment_bytes, segments, device, 0});
    if (made.code != Errc::ok) return fail(made.code, made.message);
    return exported_again(offset, bytes);
  }
  /// From the memory that it has.
  Result<Exported> exported_again(std::uint64_t offset, std::uint64_t bytes) const {
    std::vector<UniqueFd> fds;
    const Answer answer = ask({Act::export_range, Kind::allocation, bytes, 1, 0, offset}, &fds);
    if (answer.code != Errc::ok) return fail(answer.code, answer.message);
    Exported exported;
    exported.device = answer.device;
    exported.kind = answer.kind;
    exported.bytes = answer.bytes;
    exported.offset = answer.offset;
    for (std::uint32_t i = 0; i < answer.pieces; ++i) {
      DevicePiece& piece = exported.pieces.emplace_back();
      piece.handle = answer.piece[i].handle;
      piece.bytes = answer.piece[i].bytes;
      piece.allocation_id = answer.piece[i].allocation_id;
      if (i < fds.size()) piece.fd = std::move(fds[i]);
    }
    return exported;
  }
  void kill_now() {
    ::kill(pid_, SIGKILL);
    static_cast<void>(end());
  }
  /// Lets it end by itself; 0 if it left nothing behind and misused nothing.
  int end() {
    int status = 0;
    socket_.reset();
    if (pid_ > 0) ::waitpid(std::exchange(pid_, -1), &status, 0);
    return status;
  }

 private:
  pid_t pid_ = -1;
  UniqueFd socket_;
};

}  // namespace refit::cuda::test
