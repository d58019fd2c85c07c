#include "session.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "digest/digest.hpp"
#include "ipc/handshake.hpp"
#include "ipc/waiting.hpp"
#include "other_daemon.hpp"

namespace refit {
namespace {

constexpr int kSealsOfRequest = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

/// Clients trust the daemon by who owns its socket: root or this very user.
Result<void> check_socket_owner(const std::string& path) {
  struct stat status {};
  if (::lstat(path.c_str(), &status) != 0) {
    const int code = errno;
    if (code == ENOENT) {
      return Unexpected(Error{Errc::os,
                              code,
                              "no daemon at " + path +
                                  ": no such socket; start one with `refitd --socket " + path +
                                  "`, or name another",
                              {}});
    }
    return fail_os("looking at the socket " + path, code);
  }
  if (!S_ISSOCK(status.st_mode)) return fail(Errc::bad_argument, path + " is not a socket");
  if (status.st_uid != 0 && status.st_uid != ::geteuid()) {
    return fail(Errc::permission, "the socket " + path + " belongs to uid " +
                                      std::to_string(status.st_uid) +
                                      ", which is neither root nor this user: not trusted");
  }
  return {};
}

Result<UniqueFd> connect_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.size() >= sizeof address.sun_path) {
    return fail(Errc::bad_argument, "the socket path is longer than " +
                                        std::to_string(sizeof address.sun_path - 1) +
                                        " bytes: " + path);
  }
  std::memcpy(address.sun_path, path.c_str(), path.size() + 1);
  // Non-blocking: a daemon that is stopped and whose queue is full must not hold its clients.
  UniqueFd socket =
      UniqueFd::adopt(::socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!socket) return fail_os("socket", errno);
  if (::connect(socket.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
    const int code = errno;
    if (code == ECONNREFUSED) {
      return Unexpected(Error{
          Errc::os,
          code,
          "nobody listens at " + path + "; start the daemon with `refitd --socket " + path + "`",
          {}});
    }
    if (code == EAGAIN) {
      return Unexpected(
          Error{Errc::os,
                code,
                "the daemon at " + path + " does not take connections: its queue of them is full",
                {}});
    }
    if (code == EACCES || code == EPERM) {
      return fail(Errc::permission,
                  "this user may not connect to " + path + "; join the group that owns the socket");
    }
    return fail_os("connecting to " + path, code);
  }
  return socket;
}

Result<void> require_seals(int fd, int wanted, std::size_t bytes, const char* label) {
  REFIT_TRY_ASSIGN(const MemfdInfo info, inspect_memfd(fd, label));
  if ((info.seals & wanted) != wanted || info.bytes < bytes) {
    return fail(Errc::protocol,
                std::string(label) + ": the daemon sent a segment without its seals");
  }
  return {};
}

/// Waits until `fd` has `events`; Errc::deadline otherwise.
Result<void> wait_fd(int fd, short events, Deadline deadline, const std::string& what) {
  for (;;) {
    pollfd entry{fd, events, 0};
    const int count = ::poll(&entry, 1, deadline.remaining_ms());
    if (count > 0) return {};
    if (count == 0 && deadline.passed()) return fail(Errc::deadline, what + ": no answer in time");
    if (count < 0 && errno != EINTR) return fail_os(what + ": poll", errno);
  }
}

Unexpected impossible_position() {
  return fail(Errc::protocol, "the daemon's ring position is impossible");
}

/// The reply if its code is ok, else the error that it is.
Result<const wire::Reply*> outcome_of(const wire::Reply& reply) {
  const auto code = static_cast<Errc>(reply.code());
  if (code == Errc::ok) return &reply;
  Error error{code, 0, std::string(view(reply.message())), {}};
  if (reply.details() != nullptr) {
    for (const auto* line : *reply.details()) error.details.emplace_back(view(line));
  }
  return Unexpected(std::move(error));
}

}  // namespace

std::string default_socket_path() {
  if (const char* path = std::getenv("REFIT_SOCKET"); path != nullptr && *path != '\0') return path;
  if (std::getenv("XDG_RUNTIME_DIR") != nullptr) {
    if (std::string path = user_socket_path(); ::access(path.c_str(), F_OK) == 0) return path;
  }
  return system_socket_path();
}

Result<std::unique_ptr<Session>> Session::connect(Role role, const std::string& name,
                                                  const ConnectOptions& options,
                                                  Deadline deadline) {
  auto session = begin(role, name, options);
  while (!session && session.error().native == EAGAIN && !deadline.passed()) {
    constexpr int kQueueLookMs = 5;
    ::poll(nullptr, 0, std::min(kQueueLookMs, deadline.remaining_ms()));
    session = begin(role, name, options);
  }
  if (!session) return session;
  for (;;) {
    REFIT_TRY_ASSIGN(const bool welcome, (*session)->welcomed());
    if (welcome) return session;
    REFIT_TRY(wait_fd((*session)->socket_fd(), POLLIN, deadline,
                      "waiting for WELCOME from " + (*session)->socket_path_));
  }
}

Result<std::unique_ptr<Session>> Session::begin(Role role, const std::string& name,
                                                const ConnectOptions& options, bool asleep) {
  std::unique_ptr<Session> session(new Session);
  session->socket_path_ = options.socket_path.empty() ? default_socket_path() : options.socket_path;
  session->waiting_ = options.waiting;
  REFIT_TRY(check_socket_owner(session->socket_path_));
  REFIT_TRY_ASSIGN(session->socket_, connect_socket(session->socket_path_));
  REFIT_TRY(session->say_hello(role, name, asleep));
  return session;
}

Result<void> Session::say_hello(Role role, const std::string& name, bool asleep) {
  auto& hello = builder();
  hello.Finish(wire::CreateHello(hello, static_cast<std::uint8_t>(role), hello.CreateString(name),
                                 static_cast<std::uint8_t>(waiting_), asleep));
  auto sent = send_message(socket_.get(), SocketMessage::hello, hello.GetBufferPointer(),
                           hello.GetSize(), nullptr, 0);
  // A daemon that refused before it read anything has left its reason on the socket.
  if (!sent && sent.error().native != EPIPE && sent.error().native != ECONNRESET)
    return Unexpected(std::move(sent).error());
  return {};
}

Result<bool> Session::welcomed() {
  ReceivedMessage answer;
  switch (receive_message(socket_.get(), answer)) {
    case Receive::nothing_yet:
      return false;
    case Receive::message:
      REFIT_TRY(adopt_welcome(answer));
      return true;
    case Receive::closed:
      return fail(Errc::daemon_gone,
                  "the daemon at " + socket_path_ + " closed the connection during the handshake");
    case Receive::peer_broke_protocol:
      break;
  }
  return fail(Errc::protocol, socket_path_ + " answered, but not as refitd");
}

Result<void> Session::adopt_welcome(ReceivedMessage& answer) {
  if (answer.preamble.kind == static_cast<std::uint16_t>(SocketMessage::nak)) {
    const auto* nak = verified_root<wire::Nak>(answer.body.data(), answer.body.size());
    if (nak == nullptr) return fail(Errc::protocol, "the daemon refused without a readable reason");
    return fail(static_cast<Errc>(nak->code()), std::string(view(nak->message())));
  }
  const auto* welcome = verified_root<wire::Welcome>(answer.body.data(), answer.body.size());
  if (answer.preamble.kind != static_cast<std::uint16_t>(SocketMessage::welcome) ||
      welcome == nullptr || answer.fds.size() != kWelcomeFdCount ||
      welcome->request_bytes() != kRequestRegionBytes ||
      welcome->response_bytes() != kResponseRegionBytes) {
    return fail(Errc::protocol,
                socket_path_ + " sent a WELCOME that this client does not understand");
  }

  REFIT_TRY(require_seals(answer.fds[kRequestRegionFd].get(), kSealsOfRequest, kRequestRegionBytes,
                          "request region"));
  REFIT_TRY(require_seals(answer.fds[kResponseRegionFd].get(),
                          kSealsOfRequest | F_SEAL_FUTURE_WRITE, kResponseRegionBytes,
                          "response region"));
  REFIT_TRY_ASSIGN(request_mapping_,
                   Mapping::map(answer.fds[kRequestRegionFd].get(), kRequestRegionBytes,
                                Access::read_write, "request region"));
  REFIT_TRY_ASSIGN(response_mapping_,
                   Mapping::map(answer.fds[kResponseRegionFd].get(), kResponseRegionBytes,
                                Access::read_only, "response region"));
  request_ = reinterpret_cast<RequestRegion*>(request_mapping_.data());
  response_ = reinterpret_cast<const ResponseRegion*>(response_mapping_.data());
  daemon_doorbell_ = Doorbell::adopt(std::move(answer.fds[kDaemonDoorbellFd]));
  client_doorbell_ = Doorbell::adopt(std::move(answer.fds[kClientDoorbellFd]));
  daemon_pidfd_ = std::move(answer.fds[kDaemonPidfd]);
  requests_ = std::make_unique<RingProducer>(request_->requests, response_->request_head);
  replies_ = std::make_unique<RingConsumer>(response_->responses, request_->response_head);
  // Tickets start at a random place so that one session's can never be mistaken for another's in a
  // log.
  [[maybe_unused]] const auto seeded =
      ::getrandom(&next_ticket_, sizeof next_ticket_, GRND_NONBLOCK);

  try {
    arena_ = Arena(boost::interprocess::create_only, request_->arena,
                   kRequestRegionBytes - offsetof(RequestRegion, arena));
    small_payloads_ =
        static_cast<std::byte*>(arena_.allocate_aligned(kRingSlots * kSmallPayloadBytes, 64));
  } catch (const boost::interprocess::interprocess_exception& error) {
    return fail(Errc::protocol, std::string("building the request arena: ") + error.what());
  }
  return {};
}

Result<std::byte*> Session::allocate_payload(std::size_t bytes) {
  if (bytes <= kSmallPayloadBytes) {
    return small_payloads_ + requests_->position() % kRingSlots * kSmallPayloadBytes;
  }
  if (!requests_->look()) return impossible_position();
  while (!outstanding_.empty() && outstanding_.front().position < requests_->consumed()) {
    arena_.deallocate(outstanding_.front().payload);
    outstanding_.pop_front();
  }
  auto* payload = static_cast<std::byte*>(arena_.allocate(bytes, std::nothrow));
  if (payload == nullptr) {
    return fail(Errc::quota,
                "the request region has no room for " + std::to_string(bytes) + " bytes");
  }
  outstanding_.push_back({requests_->position(), payload});
  return payload;
}

Result<std::uint64_t> Session::post(wire::Opcode opcode) {
  const std::size_t bytes = builder_.GetSize();
  if (bytes > kPayloadBytesMax) {
    return fail(Errc::quota, "the request has " + std::to_string(bytes) + " bytes; the limit is " +
                                 std::to_string(kPayloadBytesMax) +
                                 " (register the model in several modules)");
  }
  switch (requests_->room()) {
    case RingProducer::Push::ok:
      break;
    case RingProducer::Push::full:
      return fail(Errc::quota,
                  "all " + std::to_string(kRingSlots) + " request slots are in flight");
    case RingProducer::Push::peer_broke_protocol:
      return impossible_position();
  }
  Descriptor descriptor;
  std::byte* payload = descriptor.payload;
  if (bytes > kInlinePayloadBytes) {
    REFIT_TRY_ASSIGN(payload, allocate_payload(bytes));
    descriptor.payload_offset = static_cast<std::uint64_t>(payload - request_mapping_.data());
  }
  std::memcpy(payload, builder_.GetBufferPointer(), bytes);
  descriptor.opcode = static_cast<std::uint16_t>(opcode);
  descriptor.payload_bytes = static_cast<std::uint32_t>(bytes);
  descriptor.request_id = next_request_++;
  descriptor.payload_xxh3 = payload_hash(builder_.GetBufferPointer(), bytes);
  if (requests_->push(descriptor) != RingProducer::Push::ok) return impossible_position();
  ring_daemon();
  return descriptor.request_id;
}

Result<const wire::Reply*> Session::take(std::uint64_t request) {
  Descriptor descriptor;
  for (;;) {
    switch (replies_->peek(descriptor)) {
      case RingConsumer::Peek::empty:
        return nullptr;
      case RingConsumer::Peek::peer_broke_protocol:
        return impossible_position();
      case RingConsumer::Peek::message:
        break;
    }
    const std::byte* payload = descriptor.payload;
    if (descriptor.payload_bytes > kInlinePayloadBytes) {
      if (descriptor.payload_bytes > kPayloadBytesMax ||
          descriptor.payload_offset > kResponseRegionBytes ||
          descriptor.payload_bytes > kResponseRegionBytes - descriptor.payload_offset) {
        return fail(Errc::protocol, "a reply lies outside the response region");
      }
      payload = response_mapping_.data() + descriptor.payload_offset;
    }
    if (descriptor.request_id != request) {
      replies_->advance();
      continue;
    }
    reply_.assign(payload, payload + descriptor.payload_bytes);
    replies_->advance();
    if (payload_hash(reply_.data(), reply_.size()) != descriptor.payload_xxh3) {
      return fail(Errc::protocol, "a reply's payload does not have its hash");
    }
    const auto* reply = verified_root<wire::Reply>(reply_.data(), reply_.size());
    if (reply == nullptr) return fail(Errc::protocol, "a reply does not verify");
    return reply;
  }
}

Result<const wire::Reply*> Session::await(std::uint64_t request, Deadline deadline, Expect expect,
                                          Pump* pump) {
  bool may_spin = expect == Expect::brief && waiting_ == Waiting::adaptive;
  std::uint32_t reads = 0;
  std::optional<Awake> awake;
  if (waiting_ == Waiting::always) awake.emplace(*request_);
  for (;;) {
    REFIT_TRY_ASSIGN(const wire::Reply* reply, take(request));
    if (reply != nullptr) return outcome_of(*reply);
    if (pump != nullptr && pump->pump()) continue;

    const auto something = [&] { return !replies_->empty() || (pump != nullptr && pump->due()); };
    if (waiting_ == Waiting::always) {
      cpu_relax();
      // A look at the clock and at the daemon's pulse every so often; the ring is read without any
      // in between.
      constexpr std::uint32_t kReadsPerLook = 4096;
      if (++reads % kReadsPerLook == 0) {
        REFIT_TRY(check_alive());
        if (deadline.passed()) return give_up(request);
      }
      continue;
    }
    if (may_spin) {
      may_spin = false;
      {
        const Awake reading(*request_);
        spin_briefly(something, kAdaptiveSpinMax);
      }
      if (something()) continue;
    }
    if (something()) continue;

    poll_fds_.clear();
    poll_fds_.push_back({client_doorbell_.fd(), POLLIN, 0});
    poll_fds_.push_back({daemon_pidfd_.get(), POLLIN, 0});
    poll_fds_.push_back({socket_.get(), POLLIN | POLLRDHUP, 0});
    if (pump != nullptr) pump->append_fds(poll_fds_);
    const int count = ::poll(poll_fds_.data(), poll_fds_.size(), deadline.remaining_ms());
    if (count < 0 && errno != EINTR) return fail_os("poll", errno);
    if (count == 0 && deadline.passed()) return give_up(request);
    if (count > 0) {
      if (poll_fds_[0].revents != 0) client_doorbell_.drain();
      // A last reply may stand in the ring of a daemon that died: it is taken before the death is
      // reported.
      if ((poll_fds_[1].revents | poll_fds_[2].revents) != 0 && replies_->empty())
        REFIT_TRY(check_alive());
    }
  }
}

Result<const wire::Reply*> Session::poll_reply(std::uint64_t request) {
  client_doorbell_.drain();
  REFIT_TRY_ASSIGN(const wire::Reply* reply, take(request));
  if (reply != nullptr) return outcome_of(*reply);
  REFIT_TRY(check_alive());
  return nullptr;
}

Unexpected Session::give_up(std::uint64_t request) {
  // Before the call returns: a source byte that the caller changes from now on is changed after
  // this word. Pairs with the load in the daemon's Refits::abandoned.
  request_->abandoned_request.store(request);
  return fail(Errc::deadline, "no reply from the daemon in time");
}

Result<const wire::Reply*> Session::call(wire::Opcode opcode, Deadline deadline, Expect expect,
                                         Pump* pump) {
  REFIT_TRY_ASSIGN(const std::uint64_t request, post(opcode));
  return await(request, deadline, expect, pump);
}

Result<std::uint64_t> Session::send_fd(int fd, Deadline deadline) {
  const TicketBody body{next_ticket_++};
  for (;;) {
    auto sent = send_message(socket_.get(), SocketMessage::ticket, &body, sizeof body, &fd, 1);
    if (sent) return body.ticket;
    if (sent.error().native == EPIPE || sent.error().native == ECONNRESET) {
      REFIT_TRY(check_alive());
    }
    if (sent.error().native != EAGAIN) return Unexpected(std::move(sent).error());
    REFIT_TRY(wait_fd(socket_.get(), POLLOUT, deadline, "sending an fd to the daemon"));
  }
}

bool Session::daemon_dead() const noexcept {
  pollfd entry{daemon_pidfd_.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

void Session::wait_for_end(Deadline deadline) const noexcept {
  pollfd fds[] = {{daemon_pidfd_.get(), POLLIN, 0}, {socket_.get(), POLLRDHUP, 0}};
  ::poll(fds, 2, deadline.remaining_ms());
}

Result<void> Session::check_alive() {
  if (daemon_dead()) return fail(Errc::daemon_gone, "the daemon at " + socket_path_ + " died");
  ReceivedMessage message;
  switch (receive_message(socket_.get(), message)) {
    case Receive::nothing_yet:
      return {};
    case Receive::message:
      if (message.preamble.kind == static_cast<std::uint16_t>(SocketMessage::nak)) {
        const auto* nak = verified_root<wire::Nak>(message.body.data(), message.body.size());
        if (nak != nullptr) {
          const auto code = static_cast<Errc>(nak->code());
          Unexpected ended = fail(Errc::daemon_gone,
                                  "the daemon ended this session: " + std::string(errc_name(code)) +
                                      ": " + std::string(view(nak->message())));
          if (code == Errc::protocol) verdict_ = ended.value();
          return ended;
        }
      }
      return {};
    case Receive::closed:
    case Receive::peer_broke_protocol:
      break;
  }
  return fail(Errc::daemon_gone, "the daemon at " + socket_path_ + " closed this session");
}

}  // namespace refit
