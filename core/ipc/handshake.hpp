// The socket's part of the protocol: a fixed preamble that every release understands, then a
// FlatBuffer.
//
// SOCK_SEQPACKET keeps message and fd boundaries. The preamble never changes shape, so that a
// daemon can tell a client of any version why it is refused. After the handshake the socket carries
// tickets (fds) only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "ipc/shared_layout.hpp"
#include "posix/unique_fd.hpp"
#include "refit/result.hpp"

namespace refit {

inline constexpr std::uint32_t kMagic = 0x54494652;  // "RFIT", little endian
inline constexpr std::uint16_t kProtocolVersion = 3;

enum class SocketMessage : std::uint16_t { hello = 1, welcome = 2, nak = 3, ticket = 4 };

struct Preamble {
  std::uint32_t magic = kMagic;
  std::uint16_t kind = 0;
  std::uint16_t protocol_version = kProtocolVersion;
  std::uint64_t layout_hash = kLayoutHash;
};
static_assert(sizeof(Preamble) == 16);

/// The body of a ticket message; one fd travels with it.
struct TicketBody {
  std::uint64_t ticket = 0;
};

/// Order of the fds in WELCOME.
enum WelcomeFd : std::size_t {
  kRequestRegionFd,
  kResponseRegionFd,
  kDaemonDoorbellFd,  ///< an eventfd; the client rings it
  kClientDoorbellFd,  ///< the read end of a pipe; the daemon rings the other
  kDaemonPidfd,       ///< readable when the daemon is dead; SO_PEERCRED names systemd under socket
                      ///< activation
  kWelcomeFdCount,
};

inline constexpr std::size_t kSocketMessageBytesMax = 4096;
inline constexpr std::size_t kSocketFdsMax = 8;
/// Fds that a session may have sent and not named in a request yet.
inline constexpr std::size_t kUnclaimedTicketsMax = 1024;

struct ReceivedMessage {
  Preamble preamble;
  std::vector<std::byte> body;
  std::vector<UniqueFd> fds;
};

/// Sends one message; never blocks. Errors: Errc::os (EAGAIN when the peer does not read, EPIPE
/// when it is gone).
Result<void> send_message(int socket, SocketMessage kind, const void* body, std::size_t body_bytes,
                          const int* fds, std::size_t fd_count);

enum class Receive { message, nothing_yet, closed, peer_broke_protocol };

/// Receives one message; never blocks. A truncated message or truncated fds (MSG_CTRUNC), a short
/// one and a wrong magic are peer_broke_protocol. Whatever the outcome, `out.fds` owns the fds that
/// came: a daemon disposes of them where closing may block.
Receive receive_message(int socket, ReceivedMessage& out);

}  // namespace refit
