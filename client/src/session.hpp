// Session: one client's connection to the daemon: handshake, request ring, replies, doorbells,
// death of the daemon.
//
// One thread at a time. Stands under Trainer, Engine and Observer; knows no message but Hello,
// Welcome, Nak and Reply. The payload arena lies in the request region and only this process
// touches its bookkeeping; the daemon sees bytes.
#pragma once

#include <poll.h>

#include <boost/interprocess/indexes/iset_index.hpp>
#include <boost/interprocess/managed_external_buffer.hpp>
#include <boost/interprocess/mem_algo/rbtree_best_fit.hpp>
#include <boost/interprocess/sync/mutex_family.hpp>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ipc/doorbell.hpp"
#include "ipc/handshake.hpp"
#include "ipc/ring.hpp"
#include "ipc/segment.hpp"
#include "ipc/shared_layout.hpp"
#include "ipc/wire.hpp"
#include "refit/connection.hpp"
#include "refit/result.hpp"
#include "regions.hpp"

namespace refit {

/// Work that a blocked call does for others on its thread: Trainer::refit pumps the gates of
/// engines bound to it.
class Pump {
 public:
  virtual ~Pump() = default;
  /// Does what is due; never blocks. True if something happened.
  virtual bool pump() = 0;
  /// True if pump() would do something: one load or a few.
  [[nodiscard]] virtual bool due() const = 0;
  virtual void append_fds(std::vector<pollfd>& fds) const = 0;
};

/// What a call waits for: `brief` work is read for before blocking, `long_running` blocks at once.
enum class Expect { brief, long_running };

class Session : public Regions {
 public:
  static Result<std::unique_ptr<Session>> connect(Role role, const std::string& name,
                                                  const ConnectOptions& options, Deadline deadline);

  /// The first half of connect(): reaches the socket and says HELLO. Never blocks; whoever waits
  /// for welcomed() watches socket_fd(). Errors: os with EAGAIN if the daemon's queue is full.
  static Result<std::unique_ptr<Session>> begin(Role role, const std::string& name,
                                                const ConnectOptions& options, bool asleep = false);
  /// True once the daemon's WELCOME is there and the session can be used. Never blocks.
  Result<bool> welcomed();

  /// An empty builder for the next request; its buffer is reused.
  flatbuffers::FlatBufferBuilder& builder() {
    builder_.Clear();
    return builder_;
  }

  /// Publishes the builder's finished buffer as a request. Errors: quota (ring or arena full,
  /// payload too long).
  Result<std::uint64_t> post(wire::Opcode opcode);

  /// Waits for the reply to `request` and returns its verified root, valid until the next call. A
  /// reply whose code is not ok becomes that error. Replies to abandoned requests are dropped.
  Result<const wire::Reply*> await(std::uint64_t request, Deadline deadline, Expect expect,
                                   Pump* pump = nullptr);

  /// await() without waiting: null if no reply is there yet and the daemon lives.
  Result<const wire::Reply*> poll_reply(std::uint64_t request);

  /// post and await.
  Result<const wire::Reply*> call(wire::Opcode opcode, Deadline deadline, Expect expect,
                                  Pump* pump = nullptr);

  /// Sends `fd` to the daemon and returns the ticket that names it.
  Result<std::uint64_t> send_fd(int fd, Deadline deadline);

  [[nodiscard]] Waiting waiting() const noexcept { return waiting_; }
  [[nodiscard]] int doorbell_fd() const noexcept { return client_doorbell_.fd(); }
  [[nodiscard]] int pidfd() const noexcept { return daemon_pidfd_.get(); }
  [[nodiscard]] int socket_fd() const noexcept { return socket_.get(); }
  void drain_doorbell() const noexcept { client_doorbell_.drain(); }

  /// True once the daemon process is dead; only then may memory that it was writing be judged.
  [[nodiscard]] bool daemon_dead() const noexcept;
  /// Errc::daemon_gone if the daemon is dead or has closed this session (with its reason, if it
  /// gave one).
  Result<void> check_alive();
  /// Set once check_alive() found that the daemon ended this session because this client broke the
  /// protocol: it would end the next one too.
  [[nodiscard]] const std::optional<Error>& verdict() const noexcept { return verdict_; }
  /// Returns once the daemon died or closed this session, or at `deadline`.
  void wait_for_end(Deadline deadline) const noexcept;

 private:
  Session() = default;
  Result<void> say_hello(Role role, const std::string& name, bool asleep);
  Result<void> adopt_welcome(ReceivedMessage& answer);
  /// Takes replies off the ring until it is empty or holds the one for `request`.
  Result<const wire::Reply*> take(std::uint64_t request);
  /// The deadline passed: tells the daemon that nobody waits for `request` any more.
  Unexpected give_up(std::uint64_t request);
  Result<std::byte*> allocate_payload(std::size_t bytes);

  using Arena = boost::interprocess::basic_managed_external_buffer<
      char, boost::interprocess::rbtree_best_fit<boost::interprocess::null_mutex_family>,
      boost::interprocess::iset_index>;

  static constexpr std::size_t kSmallPayloadBytes = 1024;

  UniqueFd socket_;
  UniqueFd daemon_pidfd_;
  Doorbell client_doorbell_;
  Mapping request_mapping_;
  Mapping response_mapping_;
  std::unique_ptr<RingProducer> requests_;
  std::unique_ptr<RingConsumer> replies_;
  Arena arena_;
  std::byte* small_payloads_ =
      nullptr;  ///< one fixed block per slot, so that small requests never search the arena

  struct Outstanding {
    std::uint64_t position;
    std::byte* payload;
  };
  std::deque<Outstanding> outstanding_;  ///< arena blocks, in ring order

  flatbuffers::FlatBufferBuilder builder_;
  std::vector<std::byte> reply_;
  std::vector<pollfd> poll_fds_;
  std::uint64_t next_request_ = 1;
  std::uint64_t next_ticket_ = 1;
  Waiting waiting_ = Waiting::adaptive;
  std::string socket_path_;
  std::optional<Error> verdict_;
};

}  // namespace refit
