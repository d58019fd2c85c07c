#include "server/server.hpp"

#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstring>
#include <thread>

#include "ipc/handshake.hpp"
#include "ipc/waiting.hpp"
#include "log.hpp"
#include "server/quota.hpp"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace refit::daemon {

struct Hello {
  Role role;
  std::string name;
  Waiting waiting;
  bool asleep;
};

namespace {

constexpr std::size_t kConnectingMax = 64;
constexpr int kRequestsPerTurn = 64;
constexpr int kAcceptsPerTurn = 64;

UniqueFd open_pidfd(pid_t pid) {
  return UniqueFd::adopt(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
}

/// The peer's supplementary groups as they were when it connected.
Result<std::vector<gid_t>> groups_of(int socket) {
  std::vector<gid_t> groups(64);
  for (;;) {
    auto length = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
    const bool done = ::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &length) == 0;
    if (!done && errno != ERANGE) return fail_os("SO_PEERGROUPS", errno);
    groups.resize(length / sizeof(gid_t));  // ERANGE tells how many there are
    if (done) return groups;
  }
}

/// The kernel's word on who connected, and a pidfd that cannot name a reused pid.
Result<PeerCredentials> peer_of(int socket, UniqueFd& pidfd) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0)
    return fail_os("SO_PEERCRED", errno);
  int fd = -1;
  length = sizeof fd;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &length) == 0) {
    pidfd = UniqueFd::adopt(fd);
  } else {
    pidfd = open_pidfd(credentials.pid);  // kernels before 6.5; the peer is connected, so the pid
                                          // was its own a moment ago
  }
  if (!pidfd) return fail_os("opening a pidfd of pid " + std::to_string(credentials.pid), errno);
  REFIT_TRY_ASSIGN(auto groups, groups_of(socket));
  return PeerCredentials{credentials.uid, credentials.gid, credentials.pid, std::move(groups)};
}

/// Who connected, as far as the kernel tells; for a client that has no session.
LogFields fields_of(int socket) {
  ucred credentials{};
  socklen_t length = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &length) != 0) return {};
  return {.client_pid = credentials.pid, .client_uid = credentials.uid};
}

unsigned cores() { return std::max(1U, std::thread::hardware_concurrency()); }

Result<Hello> decode_hello(const ReceivedMessage& message) {
  if (message.preamble.protocol_version != kProtocolVersion ||
      message.preamble.layout_hash != kLayoutHash) {
    char text[200];
    std::snprintf(text, sizeof text,
                  "the client speaks protocol %u, layout %016llx; this daemon speaks protocol %u, "
                  "layout %016llx: build both from one release",
                  message.preamble.protocol_version,
                  static_cast<unsigned long long>(message.preamble.layout_hash), kProtocolVersion,
                  static_cast<unsigned long long>(kLayoutHash));
    return fail(Errc::protocol_version, text);
  }
  const auto* hello = message.preamble.kind == static_cast<std::uint16_t>(SocketMessage::hello)
                          ? verified_root<wire::Hello>(message.body.data(), message.body.size())
                          : nullptr;
  if (hello == nullptr)
    return fail(Errc::protocol, "the first message is not a HELLO that verifies");
  if (hello->role() > static_cast<std::uint8_t>(Role::observer))
    return fail(Errc::bad_argument, "HELLO names a role that does not exist");
  if (hello->waiting() > static_cast<std::uint8_t>(Waiting::always))
    return fail(Errc::bad_argument, "HELLO names a waiting mode that does not exist");
  REFIT_TRY_ASSIGN(std::string name, decode_name(hello->name(), "session"));
  return Hello{static_cast<Role>(hello->role()), std::move(name),
               static_cast<Waiting>(hello->waiting()), hello->asleep()};
}

/// The peer closed its socket or died, whether or not the loop knows.
bool is_gone(const Session& session) {
  pollfd fds[] = {{session.socket.get(), POLLRDHUP, 0}, {session.pidfd.get(), POLLIN, 0}};
  return ::poll(fds, 2, 0) > 0;
}

}  // namespace

Server::Server(Configuration configuration, Listener listener, CompletionQueue completions,
               std::unique_ptr<CopyPool> copy_pool)
    : configuration_(std::move(configuration)),
      listener_(std::move(listener)),
      started_(Clock::now()),
      completions_(std::move(completions)),
      devices_({settings().cuda.legacy_across_uids}),
      copy_pool_(std::move(copy_pool)) {}

Result<std::unique_ptr<Server>> Server::create(Configuration configuration,
                                               ConfigurationSource source, Listener listener) {
  if (configuration.settings.waiting == Waiting::always && cores() < 2) {
    return fail(Errc::not_enough_cores,
                "waiting mode `always` needs at least 2 cores: one for the daemon, one for a "
                "client");
  }
  REFIT_TRY_ASSIGN(auto copy_pool, CopyPool::create(configuration.settings.copy_threads));
  REFIT_TRY_ASSIGN(auto completions, CompletionQueue::create());
  std::unique_ptr<Server> server(new Server(std::move(configuration), std::move(listener),
                                            std::move(completions), std::move(copy_pool)));
  REFIT_TRY(server->set_up(std::move(source)));
  return server;
}

Result<void> Server::set_up(ConfigurationSource source) {
  background_ = std::make_unique<BackgroundPool>(
      settings().check_threads == 0 ? cores() : settings().check_threads, completions_);
  closers_ = std::make_unique<BackgroundPool>(1, completions_);
  registrar_ = std::make_unique<Registrar>(registry_, replies_, scheduler_, *background_, *closers_,
                                           completions_, devices_, configuration_);
  refits_ = std::make_unique<Refits>(registry_, scheduler_, replies_, *copy_pool_, *background_,
                                     completions_, devices_, statistics_, settings().waiting);
  devices_.lost = [this](const Error& error) { device_lost_ = error; };
  checker_ = std::make_unique<Checker>(registry_, scheduler_, replies_, *background_, devices_,
                                       statistics_);
  prover_ = std::make_unique<Prover>(settings().proof_threads, completions_, devices_, statistics_);
  refits_->on_commit = [this](const Session& engine, const auto& module, const auto& plan,
                              const auto& expected) {
    prover_->committed(engine, module, plan, expected);
  };
  sleeper_ = std::make_unique<Sleeper>(registry_, scheduler_, replies_, *background_, completions_);
  reloader_ = std::make_unique<Reloader>(std::move(source), configuration_, registry_, replies_,
                                         *background_);
  reloader_->changed = [this] { on_configuration_changed(); };
  // Only noted: whoever replies may be in the middle of changing what the end of a session changes.
  replies_.overrun = [this](Session& session) { overrun_.push_back(session.id); };
  registrar_->drain_tickets = [this](Session& session) { drain_tickets(session); };
  registrar_->release_module = [this](Session& session, Module& module) {
    if (!refits_->on_registration_end(session, module)) return false;
    checker_->on_registration_end(module);
    prover_->forget(*module.registration);
    return true;
  };
  sleeper_->release_module = registrar_->release_module;
  sleeper_->release_engine = [this](Session& engine) {
    if (!refits_->on_engine_sleep(engine)) return false;
    checker_->on_engine_sleep(engine);
    return true;
  };

  own_pidfd_ = open_pidfd(::getpid());
  if (!own_pidfd_) return fail_os("opening a pidfd of this daemon", errno);

  sd_event* event = nullptr;
  if (const int code = sd_event_new(&event); code < 0) return fail_os("sd_event_new", -code);
  event_.reset(event);
  sd_event_source* added = nullptr;
  int code = sd_event_add_io(
      event, &added, listener_.fd(), EPOLLIN,
      [](sd_event_source*, int, std::uint32_t, void* self) {
        static_cast<Server*>(self)->on_listener();
        return 0;
      },
      this);
  if (code < 0) return fail_os("watching the listening socket", -code);
  listener_source_.reset(added);
  code = sd_event_add_io(
      event, &added, completions_.fd(), EPOLLIN | EPOLLET,
      [](sd_event_source*, int, std::uint32_t, void* self) {
        static_cast<Server*>(self)->completions_.drain();
        return 0;
      },
      this);
  if (code < 0) return fail_os("watching the completion queue", -code);
  completion_source_.reset(added);
  code = sd_event_add_time(
      event, &added, CLOCK_MONOTONIC, UINT64_MAX, /*accuracy=*/1,
      [](sd_event_source*, std::uint64_t, void* self) {
        static_cast<Server*>(self)->on_timer();
        return 0;
      },
      this);
  if (code < 0) return fail_os("making the timer", -code);
  timer_.reset(added);
  for (const int signal : {SIGTERM, SIGINT}) {
    code = sd_event_add_signal(
        event, &added, signal,
        [](sd_event_source*, const signalfd_siginfo* info, void* self) {
          static_cast<Server*>(self)->begin_drain("signal " + std::to_string(info->ssi_signo));
          return 0;
        },
        this);
    if (code < 0) return fail_os("watching signals", -code);
    signal_sources_.emplace_back(added);
  }
  code = sd_event_add_signal(
      event, &added, SIGHUP,
      [](sd_event_source*, const signalfd_siginfo*, void* self) {
        static_cast<Server*>(self)->reloader_->begin();
        return 0;
      },
      this);
  if (code < 0) return fail_os("watching SIGHUP", -code);
  signal_sources_.emplace_back(added);
  REFIT_TRY_ASSIGN(watchdog_, Watchdog::create(event, *copy_pool_, *background_, devices_));
  return {};
}

Server::~Server() {
  const Error reason{Errc::shutting_down, 0, "the daemon is shutting down", {}};
  refits_->cancel_waiting(reason);
  checker_->cancel(reason);
  bury();
  for (auto& [id, session] : registry_.sessions) session->sources.clear();
  connecting_.clear();
  // The pools first: what they still hold points into the members below.
  prover_->stop();
  copy_pool_.reset();
  background_.reset();
  closers_.reset();
  for (auto& [id, session] : registry_.sessions) session->closed = true;
  registry_.sessions.clear();
  completions_.drain();
}

Result<void> Server::run() {
  sd_notifyf(0, "READY=1\nSTATUS=Serving %s",
             listener_.path().empty() ? "systemd's socket" : listener_.path().c_str());
  log(LogEvent::started, "serving " +
                             (listener_.path().empty() ? "systemd's socket" : listener_.path()) +
                             " (waiting " + std::string(waiting_name(settings().waiting)) + ", " +
                             std::to_string(copy_pool_->thread_count()) + " copy threads)");
  const bool never_block = settings().waiting == Waiting::always;
  std::uint32_t turns = 0;
  for (;;) {
    if (device_lost_) return Unexpected(*device_lost_);
    if (draining_ && refits_->idle() && checker_->idle()) break;
    if (never_block && !registry_.sessions.empty()) {
      poll_everything();
      end_overrun_sessions();
      // The kernel's events (connections, deaths, timers) are looked at now and then; rings are
      // read without it.
      constexpr std::uint32_t kReadsPerLook = 1024;
      if (++turns % kReadsPerLook != 0) continue;
    }
    const std::uint64_t timeout = never_block && !registry_.sessions.empty() ? 0 : UINT64_MAX;
    const int code = sd_event_run(event_.get(), timeout);
    if (code < 0) return fail_os("sd_event_run", -code);
    end_overrun_sessions();
    bury();
    arm_timer();
    if (watchdog_ != nullptr) watchdog_->after_turn();
  }
  log(LogEvent::stopped,
      "stopped after " + std::to_string(statistics_.committed_count()) + " refits");
  return {};
}

void Server::poll_everything() {
  for (auto entry = registry_.sessions.begin(); entry != registry_.sessions.end();) {
    Session& session = *entry->second;
    ++entry;  // the session may end in here
    if (session.has_request()) on_doorbell(session);
  }
  refits_->poll_gates();
  if (completions_.waiting()) completions_.drain();
  cpu_relax();
}

void Server::end_overrun_sessions() {
  while (!overrun_.empty()) {
    const auto session = registry_.find(overrun_.back());
    overrun_.pop_back();
    if (session != nullptr) end_session(*session, "it does not read its replies");
  }
}

// ---- connecting

/// Makes room for a new connection, so that silent ones cannot keep everybody else out.
void Server::drop_oldest_connecting() {
  Connecting& oldest = *connecting_.front();
  const std::size_t count = connecting_.size();
  on_hello(oldest);  // its HELLO may have come by now
  if (connecting_.size() < count) return;
  refuse(oldest.socket.get(),
         {Errc::quota, 0, "too many connections wait for their HELLO, this one the longest", {}});
  connecting_.erase(connecting_.begin());
}

void Server::on_listener() {
  // What is left in the backlog is reported again, after the others had their turn.
  for (int i = 0; i < kAcceptsPerTurn; ++i) {
    UniqueFd socket =
        UniqueFd::adopt(::accept4(listener_.fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!socket) {
      if (errno == EMFILE || errno == ENFILE) {
        // The connection stays in the backlog; looking at it again at once would only spin.
        log(LogEvent::out_of_descriptors,
            "out of file descriptors: no new connections for a while (LimitNOFILE=)",
            {.native = errno});
        sd_event_source_set_enabled(listener_source_.get(), SD_EVENT_OFF);
        listen_again_ = Clock::now() + std::chrono::seconds(1);
      }
      return;
    }
    if (draining_) {
      refuse(socket.get(), {Errc::shutting_down, 0, "the daemon is shutting down", {}});
      continue;
    }
    if (connecting_.size() >= kConnectingMax) drop_oldest_connecting();
    auto connecting = std::make_unique<Connecting>();
    connecting->expires = Clock::now() + std::chrono::milliseconds(settings().hello_timeout_ms);
    const int fd = socket.get();
    connecting->socket = std::move(socket);
    sd_event_source* source = nullptr;
    const int code = sd_event_add_io(
        event_.get(), &source, fd, EPOLLIN,
        [](sd_event_source*, int ready, std::uint32_t, void* self) {
          auto& server = *static_cast<Server*>(self);
          const auto found =
              std::find_if(server.connecting_.begin(), server.connecting_.end(),
                           [ready](const auto& entry) { return entry->socket.get() == ready; });
          if (found != server.connecting_.end()) server.on_hello(**found);
          return 0;
        },
        this);
    if (code < 0) continue;
    connecting->source.reset(source);
    connecting_.push_back(std::move(connecting));
  }
}

void Server::refuse(int socket, const Error& error) {
  flatbuffers::FlatBufferBuilder fbb;
  const auto message = fbb.CreateString(error.message);
  fbb.Finish(wire::CreateNak(fbb, static_cast<std::uint16_t>(error.code), message));
  // A peer that does not even read its refusal gets none.
  [[maybe_unused]] const auto sent =
      send_message(socket, SocketMessage::nak, fbb.GetBufferPointer(), fbb.GetSize(), nullptr, 0);
}

void Server::on_hello(Connecting& connecting) {
  ReceivedMessage message;
  const Receive outcome = receive_message(connecting.socket.get(), message);
  registrar_->close_later(std::move(message.fds));  // a HELLO brings none
  if (outcome == Receive::nothing_yet) return;
  if (outcome == Receive::message) {
    auto hello = decode_hello(message);
    auto session = hello ? admit(connecting, *hello)
                         : Result<std::shared_ptr<Session>>(Unexpected(hello.error()));
    if (!session) {
      LogFields fields = fields_of(connecting.socket.get());
      if (hello && hello->role == Role::engine) fields.engine = hello->name;
      fields.errc = session.error().code;
      fields.native = session.error().native;
      log(LogEvent::client_refused, "refused a client: " + session.error().message, fields);
      refuse(connecting.socket.get(), session.error());
    } else if (settings().verbose) {
      log(LogEvent::session, (*session)->label_and_uid() + " connected", fields_of(**session));
    }
  } else if (outcome == Receive::peer_broke_protocol) {
    refuse(connecting.socket.get(),
           {Errc::protocol, 0, "that was no HELLO of refit's protocol", {}});
  }
  std::erase_if(connecting_, [&](const auto& entry) { return entry.get() == &connecting; });
}

Result<std::shared_ptr<Session>> Server::admit(Connecting& connecting, const Hello& hello) {
  UniqueFd pidfd;
  REFIT_TRY_ASSIGN(const PeerCredentials peer, peer_of(connecting.socket.get(), pidfd));
  const Demand one_more{"limits.sessions_per_uid", "sessions",
                        registry_.usage_of(peer.uid).sessions, 1,
                        settings().limits.sessions_per_uid};
  if (auto over = over_quota(one_more, peer.uid, hello.name, configuration_))
    return Unexpected(std::move(*over));
  if (hello.role == Role::engine) {
    auto holder = registry_.find_engine(peer.uid, hello.name);
    if (holder != nullptr && is_gone(*holder)) {
      // Its hangup has not been handled yet: an engine that reconnects is faster than our loop.
      end_session(*holder, "its name was taken over after it went");
      holder = nullptr;
    }
    if (holder != nullptr) {
      return fail(Errc::name_taken, "engine " + hello.name + " is held by pid " +
                                        std::to_string(holder->peer.pid) + " (session " +
                                        std::to_string(holder->id) + ")");
    }
  }
  if (hello.waiting == Waiting::always && cores() < spinning_sessions_ + 2) {
    return fail(Errc::not_enough_cores,
                "waiting mode `always` needs a core for the daemon and for each spinning client; "
                "this host has " +
                    std::to_string(cores()));
  }
  REFIT_TRY_ASSIGN(
      auto session,
      Session::open(
          next_session_++, UniqueFd::adopt(::fcntl(connecting.socket.get(), F_DUPFD_CLOEXEC, 3)),
          peer, std::move(pidfd), hello.role, hello.name, settings().waiting, own_pidfd_.get()));
  session->asleep = hello.asleep && hello.role == Role::engine;
  REFIT_TRY(watch(session));
  if (hello.waiting == Waiting::always) {
    session->spins = true;
    ++spinning_sessions_;
  }
  session->access = EngineAccess::of(settings().engines, peer.uid, session->name);
  registry_.sessions.emplace(session->id, session);
  return session;
}

Result<void> Server::watch(const std::shared_ptr<Session>& session) {
  // Handlers get the session's address; it stays valid until bury(), which runs outside of
  // handlers.
  session->server = this;
  const auto add = [&](int fd, std::uint32_t events,
                       sd_event_io_handler_t handler) -> Result<void> {
    sd_event_source* source = nullptr;
    if (const int code = sd_event_add_io(event_.get(), &source, fd, events, handler, session.get());
        code < 0) {
      return fail_os("watching a session", -code);
    }
    session->sources.emplace_back(source);
    return {};
  };
  // Edge-triggered: a doorbell is never read, which saves a system call for each ring.
  REFIT_TRY(add(session->daemon_doorbell_fd(), EPOLLIN | EPOLLET,
                [](sd_event_source*, int, std::uint32_t, void* self) {
                  auto& one = *static_cast<Session*>(self);
                  one.server->on_doorbell(one);
                  return 0;
                }));
  // Not by ringing it: the client could make that block. Re-arming an edge that is still readable
  // is as good.
  session->ring_myself = [one = session.get()] {
    if (!one->sources.empty())
      sd_event_source_set_io_events(one->sources.front().get(), EPOLLIN | EPOLLET);
  };
  REFIT_TRY(add(session->socket.get(), EPOLLIN | EPOLLRDHUP,
                [](sd_event_source*, int, std::uint32_t events, void* self) {
                  auto& one = *static_cast<Session*>(self);
                  one.server->on_socket(one, events);
                  return 0;
                }));
  // A client that forked keeps its socket open after death; the pidfd tells.
  return add(session->pidfd.get(), EPOLLIN, [](sd_event_source*, int, std::uint32_t, void* self) {
    auto& one = *static_cast<Session*>(self);
    one.server->end_session(one, "it died");
    return 0;
  });
}

// ---- a session's life

void Server::on_doorbell(Session& session) {
  if (session.closed) return;
  for (int i = 0; i < kRequestsPerTurn; ++i) {
    Session::Request request;
    std::string reason;
    const Session::Next next = session.next_request(request, reason);
    if (next == Session::Next::violation) return violate(session, reason);
    if (next == Session::Next::none) break;
    const bool costly = request.opcode == wire::Opcode::register_module;
    dispatch(session, request);
    if (session.closed) return;
    // A manifest may take a while to check: the others get their turn before this session's next
    // one.
    if (costly) break;
  }
  if (session.role == Role::engine) refits_->on_engine_answer(session);
  // The edge is spent: what is left in the ring needs another one.
  if (session.has_request() && settings().waiting != Waiting::always) session.ring_myself();
}

void Server::on_socket(Session& session, std::uint32_t events) {
  drain_tickets(session);
  if (session.closed) return;
  if ((events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0)
    end_session(session, "it closed its socket");
}

void Server::drain_tickets(Session& session) {
  ReceivedMessage message;
  for (;;) {
    if (session.closed) return;
    switch (receive_message(session.socket.get(), message)) {
      case Receive::nothing_yet:
        return;
      case Receive::closed:
        registrar_->close_later(std::move(message.fds));
        return;  // the hangup event ends the session
      case Receive::peer_broke_protocol:
        registrar_->close_later(std::move(message.fds));
        return violate(session, "a message on its socket was truncated or is not refit's");
      case Receive::message:
        break;
    }
    TicketBody body;
    if (message.preamble.kind != static_cast<std::uint16_t>(SocketMessage::ticket) ||
        message.body.size() != sizeof body || message.fds.size() != 1) {
      registrar_->close_later(std::move(message.fds));
      return violate(session, "its socket carried something other than a ticket with one fd");
    }
    std::memcpy(&body, message.body.data(), sizeof body);
    if (session.tickets.size() >= kUnclaimedTicketsMax || session.tickets.count(body.ticket) != 0) {
      registrar_->close_later(std::move(message.fds));
      return violate(session, session.tickets.count(body.ticket) != 0
                                  ? "it used a ticket twice"
                                  : "it left more than " + std::to_string(kUnclaimedTicketsMax) +
                                        " tickets unclaimed");
    }
    Session::Ticket held{
        {}, Clock::now() + std::chrono::milliseconds(settings().fd_timeout_ms), {}};
    const Demand one_more{"limits.unclaimed_fds_per_uid", "unclaimed fds",
                          registry_.usage_of(session.peer.uid).unclaimed_fds, 1,
                          settings().limits.unclaimed_fds_per_uid};
    if (const auto over = over_quota(one_more, session.peer.uid, session.name, configuration_)) {
      held.refusal = over->message;
      registrar_->close_later(std::move(message.fds));
    } else {
      held.fd = std::move(message.fds.front());
    }
    session.tickets.emplace(body.ticket, std::move(held));
  }
}

void Server::violate(Session& session, const std::string& reason) {
  if (session.closed) return;
  LogFields fields = fields_of(session);
  fields.errc = Errc::protocol;
  log(LogEvent::protocol_broken, session.label_and_uid() + " broke the protocol: " + reason,
      fields);
  refuse(session.socket.get(), {Errc::protocol, 0, reason, {}});
  end_session(session, reason);
}

void Server::end_session(Session& session, const std::string& reason) {
  if (session.closed) return;
  session.closed = true;
  if (settings().verbose)
    log(LogEvent::session, session.label() + " ended: " + reason, fields_of(session));
  const auto found = registry_.sessions.find(session.id);
  REFIT_ASSERT(found != registry_.sessions.end());
  dead_.push_back(found->second);
  registry_.sessions.erase(found);
  if (session.spins) --spinning_sessions_;
  refits_->on_session_end(session);
  checker_->on_session_end(session);
  sleeper_->on_session_end(session);
  for (const auto& [name, module] : session.modules) prover_->forget(*module->registration);
  discard_tickets(session, Clock::time_point::max());
  // The peer sees the end at once, also when a refit still holds the session.
  ::shutdown(session.socket.get(), SHUT_RDWR);
}

void Server::bury() {
  for (const auto& session : dead_) {
    session->sources.clear();
    session->socket.reset();
    for (auto& [name, module] : session->modules) {
      registrar_->drop_later(std::move(module->registration));
    }
    session->modules.clear();
  }
  dead_.clear();
}

/// Closes the fds of tickets that expire up to `until`.
void Server::discard_tickets(Session& session, Clock::time_point until) {
  std::vector<UniqueFd> fds;
  for (auto entry = session.tickets.begin(); entry != session.tickets.end();) {
    if (entry->second.expires > until) {
      ++entry;
      continue;
    }
    fds.push_back(std::move(entry->second.fd));
    entry = session.tickets.erase(entry);
  }
  registrar_->close_later(std::move(fds));
}

// ---- requests

template <typename Message, typename Handler>
void Server::with_message(Session& session, const Session::Request& request, Handler&& handler) {
  const Message* message = verified_root<Message>(request.payload, request.payload_bytes);
  if (message == nullptr)
    return violate(session, "a request does not verify as its opcode's message");
  handler(*message);
}

void Server::dispatch(Session& session, const Session::Request& request) {
  const auto now = Clock::now();
  // More answers than the ring holds could never be delivered.
  if (++session.in_flight > kRingSlots) {
    return replies_.send_error(
        session, request.id,
        {Errc::quota,
         0,
         "more than " + std::to_string(kRingSlots) + " requests of this session are unanswered",
         {}});
  }
  // Adding up is left out while no session has more than its share of what its uid may have.
  const std::uint64_t allowed = settings().limits.requests_per_uid;
  if (session.in_flight * registry_.sessions.size() > allowed) {
    const Demand one_more{"limits.requests_per_uid", "unanswered requests",
                          registry_.usage_of(session.peer.uid).requests - 1, 1, allowed};
    if (const auto over = over_quota(one_more, session.peer.uid, session.name, configuration_))
      return replies_.send_error(session, request.id, *over);
  }
  const bool starts_work =
      request.opcode == wire::Opcode::refit || request.opcode == wire::Opcode::register_module ||
      request.opcode == wire::Opcode::check || request.opcode == wire::Opcode::digest;
  if (draining_ && starts_work) {
    if (request.opcode == wire::Opcode::refit) statistics_.failed(Errc::shutting_down);
    return replies_.send_error(session, request.id,
                               {Errc::shutting_down, 0, "the daemon is shutting down", {}});
  }
  switch (request.opcode) {
    case wire::Opcode::ping:
      return with_message<wire::StatusQuery>(
          session, request, [&](const auto&) { replies_.send_ok(session, request.id); });
    case wire::Opcode::register_module:
      return with_message<wire::RegisterModule>(session, request, [&](const auto& message) {
        registrar_->register_module(session, request.id, message);
      });
    case wire::Opcode::unregister_module:
      return with_message<wire::UnregisterModule>(session, request, [&](const auto& message) {
        registrar_->unregister_module(session, request.id, message);
      });
    case wire::Opcode::refit:
      return with_message<wire::Refit>(session, request, [&](const auto& message) {
        refits_->begin(session, request.id, message, now);
      });
    case wire::Opcode::check:
      return with_message<wire::Check>(session, request, [&](const auto& message) {
        checker_->begin_check(session, request.id, message, now);
      });
    case wire::Opcode::digest:
      return with_message<wire::DigestQuery>(session, request, [&](const auto& message) {
        checker_->begin_digest(session, request.id, message, now);
      });
    case wire::Opcode::status:
      return with_message<wire::StatusQuery>(session, request, [&](const auto&) {
        reply_status(replies_, session, request.id, registry_, facts(now));
      });
    case wire::Opcode::tensors:
      return with_message<wire::TensorsQuery>(session, request, [&](const auto& message) {
        reply_tensors(replies_, session, request.id, registry_, message);
      });
    case wire::Opcode::drain:
      return with_message<wire::Drain>(session, request,
                                       [&](const auto&) { drain(session, request.id); });
    case wire::Opcode::metrics:
      return with_message<wire::MetricsQuery>(session, request, [&](const auto&) {
        reply_metrics(replies_, session, request.id, registry_, facts(now), statistics_);
      });
    case wire::Opcode::sleep:
      return with_message<wire::Sleep>(session, request,
                                       [&](const auto&) { sleeper_->sleep(session, request.id); });
    case wire::Opcode::wake:
      return with_message<wire::Wake>(session, request,
                                      [&](const auto&) { sleeper_->wake(session, request.id); });
    case wire::Opcode::reload:
      return with_message<wire::ReloadQuery>(
          session, request, [&](const auto&) { reloader_->begin(session, request.id); });
  }
  violate(session,
          "opcode " + std::to_string(static_cast<unsigned>(request.opcode)) + " does not exist");
}

// ---- time and signals

/// The timer is only ever moved forward in time when it fires: a refit that ends in time costs no
/// system call here.
void Server::arm_timer() {
  auto next =
      std::min({refits_->next_deadline(), checker_->next_deadline(), drain_until_, listen_again_});
  for (const auto& connecting : connecting_) next = std::min(next, connecting->expires);
  for (const auto& [id, session] : registry_.sessions) {
    for (const auto& [ticket, held] : session->tickets) next = std::min(next, held.expires);
  }
  if (next >= timer_armed_) return;
  timer_armed_ = next;
  const auto us =
      std::chrono::duration_cast<std::chrono::microseconds>(next.time_since_epoch()).count();
  sd_event_source_set_time(timer_.get(),
                           static_cast<std::uint64_t>(std::max<std::int64_t>(us, 0)) + 1);
  sd_event_source_set_enabled(timer_.get(), SD_EVENT_ONESHOT);
}

void Server::on_timer() {
  const auto now = Clock::now();
  timer_armed_ = Clock::time_point::max();
  if (now >= listen_again_) {
    listen_again_ = Clock::time_point::max();
    sd_event_source_set_enabled(listener_source_.get(), SD_EVENT_ON);
  }
  refits_->on_time(now);
  checker_->on_time(now);
  std::erase_if(connecting_, [&](const auto& connecting) {
    if (now < connecting->expires) return false;
    refuse(connecting->socket.get(), {Errc::deadline, 0, "no HELLO in time", {}});
    return true;
  });
  for (auto& [id, session] : registry_.sessions) {
    discard_tickets(*session, now);
  }
  if (now >= drain_until_) {
    drain_until_ = Clock::time_point::max();
    const Error reason{
        Errc::shutting_down, 0, "the daemon is shutting down; nothing was changed", {}};
    refits_->cancel_waiting(reason);
    checker_->cancel(reason);
  }
}

/// Sessions, registrations and what waits stay as they are; limits and rules hold for what comes.
void Server::on_configuration_changed() {
  for (const auto& [id, session] : registry_.sessions)
    session->access = EngineAccess::of(settings().engines, session->peer.uid, session->name);
}

/// What runs may finish, what comes is refused. A second signal calls off what waits; a write is
/// always finished, because ending in the middle of one would poison the module.
void Server::begin_drain(const std::string& cause) {
  log(LogEvent::draining, cause + ": draining");
  drain_until_ = draining_ ? Clock::now()
                           : Clock::now() + std::chrono::milliseconds(settings().drain_timeout_ms);
  if (!draining_) sd_notify(0, "STOPPING=1\nSTATUS=Draining");
  draining_ = true;
}

/// As SIGTERM, for those who could send one. Asked again it changes nothing: unlike a second
/// signal it does not hurry.
void Server::drain(Session& asker, std::uint64_t request_id) {
  if (asker.peer.uid != 0 && asker.peer.uid != ::geteuid()) {
    return replies_.send_error(asker, request_id,
                               {Errc::permission,
                                0,
                                "uid " + std::to_string(asker.peer.uid) +
                                    " may not drain this daemon, which runs as uid " +
                                    std::to_string(::geteuid()) + ": only that user and root may",
                                {}});
  }
  replies_.send_ok(asker, request_id);
  if (!draining_) {
    begin_drain("asked by " + asker.label() + " of uid " + std::to_string(asker.peer.uid));
  }
}

DaemonFacts Server::facts(Clock::time_point now) const {
  const auto uptime = std::chrono::duration_cast<std::chrono::microseconds>(now - started_);
  return {now,
          static_cast<std::uint64_t>(uptime.count()),
          statistics_.committed_count(),
          copy_pool_->thread_count(),
          copy_pool_->kernel_name(),
          listener_.path(),
          settings().waiting,
          draining_,
          settings().limits};
}

}  // namespace refit::daemon
