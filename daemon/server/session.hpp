// Session: the daemon's end of one client: credentials, rings, doorbells, tickets, registered
// modules.
//
// The loop thread alone. Everything read from the request region is untrusted: descriptors and
// payloads are copied out, bounded and verified before use. Running copies and state words outlive
// a session through SessionMemory and Registration.
#pragma once

#include <sys/types.h>
#include <systemd/sd-event.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ipc/doorbell.hpp"
#include "ipc/ring.hpp"
#include "ipc/segment.hpp"
#include "ipc/shared_layout.hpp"
#include "ipc/wire.hpp"
#include "log.hpp"
#include "plan/manifest.hpp"
#include "refit/result.hpp"
#include "server/clock.hpp"
#include "server/engine_access.hpp"
#include "server/mapped_region.hpp"

namespace refit::daemon {

class Server;

/// The two regions of a session. Shared, because the words must stay mapped as long as a
/// transaction writes them.
struct SessionMemory {
  Mapping request;
  Mapping response;
  /// Mapped read-only: the daemon never writes where the client does.
  [[nodiscard]] const RequestRegion& request_region() const noexcept {
    return *reinterpret_cast<const RequestRegion*>(request.data());
  }
  [[nodiscard]] ResponseRegion& response_region() const noexcept {
    return *reinterpret_cast<ResponseRegion*>(response.data());
  }
};

/// That a check found every tensor of a module equal, and which version that was.
struct Proof {
  std::uint64_t version = 0;
  Clock::time_point at;
};

/// A checked manifest with its memory mapped. Immutable but for `proof`, and until `populated`,
/// which the loop thread sets once, for what a background thread adds to regions and event.
struct Registration {
  /// Whoever waits until this memory is its client's alone; the first member, so that it is let go
  /// behind all others, on whichever thread that is.
  std::shared_ptr<void> awaited;
  std::shared_ptr<const Manifest> manifest;
  std::vector<MappedRegion> regions;
  /// Recorded by the client before each refit, behind its own work on the tensors; may be null.
  std::shared_ptr<DeviceEvent> event;
  std::uint64_t generation = 0;  ///< unique in this daemon's life
  std::uint32_t residency_base =
      0;  ///< of its layer buffers' words in the session's request region
  bool populated = false;
  bool asleep = false;  ///< a sleeping engine's: the memory was given up, only the manifest is left
  std::optional<Proof> proof;  ///< the last one

  /// False if some of its memory vanishes with the client, though it is held here.
  [[nodiscard]] bool outlives_its_client() const noexcept {
    return std::none_of(regions.begin(), regions.end(), [](const MappedRegion& region) {
      return region.kind == RegionKind::cuda_legacy || region.kind == RegionKind::cuda_local;
    });
  }
};

/// The phases of a refit in microseconds, as the wire has them.
struct PhaseTimes {
  float wait_us = 0, gate_us = 0, copy_us = 0, check_us = 0, total_us = 0;
};

/// A transaction that a module committed. Equal if it is the same transaction over the same
/// tensors.
struct Committed {
  TransactionId id;
  std::uint64_t selection = 0;
  std::uint64_t version = 0;
  friend bool operator==(const Committed& a, const Committed& b) noexcept {
    return a.id == b.id && a.selection == b.selection;
  }
};

/// One registered module and what happened to it.
struct Module {
  std::string name;
  std::shared_ptr<Registration> registration;
  std::uint32_t slot = 0;  ///< of the state words; engines only
  std::string last_source;
  std::uint64_t refits = 0;
  std::uint64_t last_bytes = 0;
  PhaseTimes last;
  std::array<Committed, 16>
      recent{};  ///< what it committed lately; a repeated id is answered from it
};

/// Who may touch an engine now: one transaction, or any number of checks. `blocked` marks engines
/// that an earlier waiting operation wants while the queue is walked.
struct EngineLock {
  bool exclusive = false;
  unsigned shared = 0;
  bool blocked = false;
};

struct EventSourceDeleter {
  void operator()(sd_event_source* source) const noexcept { sd_event_source_disable_unref(source); }
};
using EventSource = std::unique_ptr<sd_event_source, EventSourceDeleter>;

class Session {
 public:
  /// Makes the regions, seals them, sends WELCOME. The fds that the client needs are sent, not
  /// kept.
  static Result<std::shared_ptr<Session>> open(std::uint64_t id, UniqueFd socket,
                                               PeerCredentials peer, UniqueFd pidfd, Role role,
                                               std::string name, Waiting daemon_waiting,
                                               int daemon_pidfd);

  /// A session over regions and doorbells that are there already.
  static std::shared_ptr<Session> over(std::shared_ptr<SessionMemory> memory,
                                       Doorbell daemon_doorbell, Doorbell client_doorbell);

  /// "engine flux (session 3, pid 812)", for messages and logs.
  [[nodiscard]] std::string label() const;
  [[nodiscard]] std::string label_and_uid() const {
    return label() + " of uid " + std::to_string(peer.uid);
  }

  /// What its registrations hold mapped.
  [[nodiscard]] std::size_t region_count() const noexcept;
  [[nodiscard]] std::uint64_t registered_bytes() const noexcept;

  // -- requests

  struct Request {
    wire::Opcode opcode{};
    std::uint64_t id = 0;
    const std::byte* payload = nullptr;  ///< private memory, valid until the next call
    std::size_t payload_bytes = 0;
  };
  enum class Next { none, request, violation };
  /// Takes the next request off the ring. On a violation `reason` says what was wrong.
  Next next_request(Request& out, std::string& reason);
  [[nodiscard]] bool has_request() const noexcept { return !requests_->empty(); }

  /// Publishes a finished Reply. False if the client lets its replies pile up: the session must
  /// end.
  [[nodiscard]] bool reply(std::uint64_t request_id, const flatbuffers::FlatBufferBuilder& builder);

  void wake_client() const noexcept {
    if (memory->request_region().client_awake.load() == 0) client_doorbell_.ring();
  }

  // -- tickets

  struct Ticket {
    UniqueFd fd;  ///< none if it was refused
    Clock::time_point expires;
    std::string refusal;  ///< told to the request that names the ticket: the socket has no answers
  };
  std::map<std::uint64_t, Ticket> tickets;

  // -- identity and state; the server reads and writes these

  std::uint64_t id = 0;
  Role role = Role::observer;
  std::string name;
  PeerCredentials peer;
  Clock::time_point connected = Clock::now();
  UniqueFd socket;
  UniqueFd pidfd;
  std::shared_ptr<SessionMemory> memory;
  std::map<std::string, std::shared_ptr<Module>, std::less<>> modules;
  bool closed = false;
  bool denial_logged = false;  ///< its later ones are not, so that it cannot fill the log
  std::size_t in_flight =
      0;  ///< requests taken and not answered; more than the ring holds are refused

  // engines only
  EngineAccess access;  ///< besides the own uid
  EngineLock lock;
  bool asleep = false;  ///< refits, checks and digests are refused
  std::uint64_t gate_epoch = 0;
  float last_gate_us =
      0;  ///< how long the engine took to answer last; says whether reading for it is worth while

  Server* server = nullptr;  ///< whose loop the sources belong to
  bool spins = false;        ///< its client waits in mode `always`
  /// Another edge for this session's own doorbell, from the loop that watches it.
  std::function<void()> ring_myself;
  [[nodiscard]] int daemon_doorbell_fd() const noexcept { return daemon_doorbell_.fd(); }

 private:
  Session() = default;
  /// Room for the next reply's payload, or nullptr.
  std::byte* allocate_payload(std::size_t bytes);

  Doorbell daemon_doorbell_;
  Doorbell client_doorbell_;
  std::unique_ptr<RingConsumer> requests_;
  std::unique_ptr<RingProducer> replies_;
  std::vector<std::byte> payload_;  ///< private copy of the request under work
  /// Absolute end position of each reply's payload, by ring slot: what the client has consumed is
  /// free again.
  std::array<std::uint64_t, kRingSlots> payload_ends_{};
  std::uint64_t payload_position_ = 0;

 public:
  /// The doorbell's first. Declared last: gone before the fds that they watch.
  std::vector<EventSource> sources;
};

/// What the journal says of a session.
inline LogFields fields_of(const Session& session) {
  LogFields fields{.client_pid = session.peer.pid, .client_uid = session.peer.uid};
  if (session.role == Role::engine) fields.engine = session.name;
  return fields;
}

}  // namespace refit::daemon
