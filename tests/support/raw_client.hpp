// RawClient: speaks the daemon's socket and ring by itself, so that a test can say what no honest
// client library would.
//
// One thread. Stands on core only. Waits are bounded so that a test cannot hang; nothing is
// asserted about how long they took.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "ipc/handshake.hpp"
#include "ipc/segment.hpp"
#include "ipc/shared_layout.hpp"
#include "ipc/wire.hpp"
#include "posix/unique_fd.hpp"
#include "refit/errc.hpp"
#include "refit/types.hpp"

namespace refit::test {

using Bytes = std::vector<std::uint8_t>;

class RawClient {
 public:
  /// Connects and says nothing.
  explicit RawClient(const std::string& socket);
  /// Connects and shakes hands; aborts the test process if the daemon refuses.
  static RawClient joined(const std::string& socket, Role role, const std::string& name);

  // -- socket

  struct Answer {
    enum class Kind { welcome, nak, closed, silence };
    Kind kind = Kind::silence;
    Errc code = Errc::ok;
    std::string message;
  };
  /// One message as it is; false if the socket does not take it.
  bool send_raw(const Bytes& message, const std::vector<int>& fds = {});
  bool send(SocketMessage kind, const Bytes& body, const std::vector<int>& fds = {},
            const Preamble& preamble = {});
  bool hello(Role role, const std::string& name, const Preamble& preamble = {});
  /// The daemon's next message on the socket. A WELCOME is taken up.
  Answer answer();
  /// The reason with which the daemon ended this session: its NAK, then the hangup. `silence` if it
  /// did not end it.
  Answer ended();
  bool send_ticket(std::uint64_t ticket, int fd);

  // -- ring

  [[nodiscard]] RequestRegion& request() const {
    return *reinterpret_cast<RequestRegion*>(request_.data());
  }
  [[nodiscard]] const ResponseRegion& response() const {
    return *reinterpret_cast<const ResponseRegion*>(response_.data());
  }
  /// Puts `payload` where it belongs and publishes a right descriptor for it; returns the request
  /// id.
  std::uint64_t post(wire::Opcode opcode, const Bytes& payload);
  /// A right descriptor for `payload`, which is put into it or into the arena, for a test to spoil.
  Descriptor describe(wire::Opcode opcode, const Bytes& payload);
  /// Publishes a descriptor as it is.
  void publish(const Descriptor& descriptor);
  /// publish and ring.
  void push(const Descriptor& descriptor);
  void ring() const;
  /// Where the next request goes.
  [[nodiscard]] RingSlot& next_slot() const { return request().requests[position_ % kRingSlots]; }

  struct Reply {
    std::uint64_t request = 0;
    Errc code = Errc::ok;
    std::string message;
    std::vector<std::string> details;
  };
  /// The next reply on the ring, or nothing if the session ended (or nothing came).
  std::optional<Reply> next_reply();
  /// The reply to `request`; replies to others are dropped.
  std::optional<Reply> reply(std::uint64_t request);
  /// post and reply.
  std::optional<Reply> call(wire::Opcode opcode, const Bytes& payload);
  /// Replies that the daemon has published.
  [[nodiscard]] std::uint64_t replies() const;
  /// Those that wait on the ring, unread.
  [[nodiscard]] std::uint64_t unread() const { return replies() - replies_taken_; }
  /// Gives them back unread.
  void skip_replies();

  [[nodiscard]] int client_doorbell() const { return client_doorbell_.get(); }
  [[nodiscard]] int daemon_doorbell() const { return daemon_doorbell_.get(); }
  [[nodiscard]] int socket() const { return socket_.get(); }
  [[nodiscard]] int response_fd() const { return response_fd_.get(); }

 private:
  UniqueFd socket_;
  Mapping request_;
  Mapping response_;
  UniqueFd response_fd_;
  UniqueFd daemon_doorbell_;
  UniqueFd client_doorbell_;
  std::uint64_t next_request_ = 1;
  std::uint64_t position_ = 0;
  std::uint64_t replies_taken_ = 0;
  std::size_t arena_position_ = 0;
};

// ---- messages

struct RawRegion {
  std::uint64_t ticket = 0;
  std::uint64_t bytes = 0;
};
struct RawTarget {
  std::string engine, module, source;
  std::vector<std::string> selection = {};
};

/// What an engine that offloads adds to a registration.
struct RawLayers {
  std::vector<std::uint32_t> pools = {};         ///< indices of regions
  std::vector<std::uint64_t> buffer_bytes = {};  ///< of each layer buffer
  std::uint32_t words = 0;                       ///< number of the first residency word
  bool asleep = false;
};

Bytes register_message(const std::string& module, const std::vector<RawRegion>& regions,
                       const std::vector<TensorSpec>& tensors,
                       const std::vector<NameRule>& rules = {}, const RawLayers& layers = {});
Bytes refit_message(const TransactionId& id, const std::vector<RawTarget>& targets,
                    std::uint64_t deadline_us = 20'000'000,
                    wire::Staging staging = wire::Staging::direct);
Bytes digest_message(const std::string& engine, const std::string& module,
                     const std::vector<std::string>& selection = {},
                     std::uint64_t deadline_us = 20'000'000);
Bytes check_message(const std::string& engine, const std::string& module,
                    const std::vector<std::string>& expected);
Bytes unregister_message(const std::string& module);
Bytes tensors_message(const std::string& engine, const std::string& module);
Bytes empty_message();

/// A memfd as an honest client makes one: backed and sealed.
UniqueFd honest_memfd(std::size_t bytes, int seals);
/// One tensor of `bytes` bytes at the region's start.
TensorSpec byte_tensor(const std::string& name, std::uint64_t bytes);

}  // namespace refit::test
