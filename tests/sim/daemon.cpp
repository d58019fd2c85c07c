#include "daemon.hpp"

#include <fcntl.h>

#include <algorithm>

#include "ipc/wire.hpp"
#include "model.hpp"
#include "support/must.hpp"

namespace refit::sim {
namespace {

using test::must;

constexpr uid_t kUid = 1000;
constexpr int kRequestsPerTurn = 64;

/// Fresh regions, as Session::open makes them, but for the pages that nobody touches.
std::shared_ptr<daemon::SessionMemory> make_memory() {
  auto memory = std::make_shared<daemon::SessionMemory>();
  for (Mapping* mapping : {&memory->request, &memory->response}) {
    const std::size_t bytes =
        mapping == &memory->request ? kRequestRegionBytes : kResponseRegionBytes;
    const UniqueFd fd = must(make_memfd("region", bytes));
    *mapping = must(Mapping::map(fd.get(), bytes, Access::read_write, "region"));
  }
  return memory;
}

}  // namespace

Daemon::Daemon(Kernel& kernel, Waiting waiting, std::uint64_t first_link)
    : kernel_(kernel),
      process_(kernel.self()),
      waiting_(waiting),
      completions_(must(daemon::CompletionQueue::create())),
      copy_pool_(must(CopyPool::create(2))),
      background_(1, completions_),
      closers_(1, completions_),
      registrar_(registry_, replies_, scheduler_, background_, closers_, completions_, devices_,
                 configuration_),
      refits_(registry_, scheduler_, replies_, *copy_pool_, background_, completions_, devices_,
              statistics_, waiting),
      next_link_(first_link) {
  replies_.overrun = [this](daemon::Session& session) { overrun_.push_back(session.id); };
  registrar_.drain_tickets = [this](daemon::Session& session) {
    Link& link = *links_.at(session.id);
    for (auto& [ticket, fd] : link.tickets) {
      session.tickets.emplace(
          ticket, daemon::Session::Ticket{std::move(fd), daemon::Clock::now() + seconds(5), {}});
    }
    link.tickets.clear();
  };
  registrar_.release_module = [this](daemon::Session& session, daemon::Module& module) {
    return refits_.on_registration_end(session, module);
  };
}

Daemon::~Daemon() {
  const bool was_mute = std::exchange(kernel_.mute, true);
  for (auto& [id, session] : registry_.sessions) session->closed = true;
  registry_.sessions.clear();
  dead_.clear();
  completions_.drain();
  kernel_.mute = was_mute;
}

void Daemon::run() {
  const auto has_work = [this] { return !due().empty(); };
  while (!kernel_.dying()) {
    kernel_.wait(has_work, refits_.next_deadline());
    if (kernel_.dying()) return;
    // In which order the kernel reports what is ready is nobody's promise.
    const auto events = due();
    if (!events.empty()) events[kernel_.chance.below(events.size())]();
    end_overrun_sessions();
    bury();
  }
}

/// What is ready, each as what to do about it.
std::vector<std::function<void()>> Daemon::due() {
  std::vector<std::function<void()>> events;
  if (!backlog.empty()) events.emplace_back([this] { accept(); });
  if (completions_.waiting()) events.emplace_back([this] { completions_.drain(); });
  if (kernel_.now() >= refits_.next_deadline())
    events.emplace_back([this] { refits_.on_time(kernel_.now()); });
  for (auto& [id, session] : registry_.sessions) {
    const auto& link = links_.at(id);
    if (link->daemon_bell.rung()) {
      events.emplace_back([this, session = session, link] {
        link->daemon_bell.drain();
        on_doorbell(*session, *link);
      });
    }
    if (link->client_gone())
      events.emplace_back([this, session = session] { end_session(*session); });
  }
  return events;
}

void Daemon::accept() {
  const auto connecting = backlog.front();
  backlog.pop_front();
  admit(*connecting);
  if (!kernel_.dying()) connecting->answered = true;
}

void Daemon::admit(Connecting& connecting) {
  if (connecting.role == Role::engine) {
    auto holder = registry_.find_engine(kUid, connecting.name);
    if (holder != nullptr && links_.at(holder->id)->client_gone()) {
      end_session(*holder);
      holder = nullptr;
    }
    if (holder != nullptr) return;
  }
  auto link = std::make_shared<Link>();
  link->id = next_link_++;
  link->memory = make_memory();
  link->daemon_bell = must(Doorbell::create());
  link->client_bell = must(Doorbell::create());
  link->client = connecting.client;
  link->daemon = process_;
  auto session = daemon::Session::over(link->memory, link->daemon_bell.other_end(),
                                       link->client_bell.other_end());
  session->id = link->id;
  session->role = connecting.role;
  session->name = connecting.name;
  session->peer.uid = kUid;
  session->pidfd = UniqueFd::adopt(::fcntl(connecting.client->pidfd.get(), F_DUPFD_CLOEXEC, 3));
  session->ring_myself = [bell = link->daemon_bell.other_end()] { bell.ring(); };
  link->session = session;
  links_[link->id] = link;
  registry_.sessions.emplace(link->id, std::move(session));
  if (kernel_.dying()) return;
  link->closed_by_client = connecting.given_up;
  connecting.link = std::move(link);
}

void Daemon::on_doorbell(daemon::Session& session, Link& link) {
  if (session.closed) return;
  for (int i = 0; i < kRequestsPerTurn; ++i) {
    daemon::Session::Request request;
    std::string reason;
    const auto next = session.next_request(request, reason);
    if (next == daemon::Session::Next::violation) {
      kernel_.violate("a client broke the protocol: " + reason);
      return;
    }
    if (next == daemon::Session::Next::none) break;
    const bool costly = request.opcode == wire::Opcode::register_module;
    dispatch(session, request);
    if (session.closed) return;
    if (costly) break;
  }
  if (session.role == Role::engine) refits_.on_engine_answer(session);
  if (session.has_request()) link.daemon_bell.ring();
}

void Daemon::dispatch(daemon::Session& session, const daemon::Session::Request& request) {
  const auto now = daemon::Clock::now();
  ++session.in_flight;
  switch (request.opcode) {
    case wire::Opcode::register_module:
      return registrar_.register_module(
          session, request.id,
          *verified_root<wire::RegisterModule>(request.payload, request.payload_bytes));
    case wire::Opcode::unregister_module:
      return registrar_.unregister_module(
          session, request.id,
          *verified_root<wire::UnregisterModule>(request.payload, request.payload_bytes));
    case wire::Opcode::refit:
      return refits_.begin(session, request.id,
                           *verified_root<wire::Refit>(request.payload, request.payload_bytes),
                           now);
    default:
      kernel_.violate("no client sends that");
  }
}

void Daemon::end_session(daemon::Session& session) {
  if (session.closed) return;
  session.closed = true;
  const auto found = registry_.sessions.find(session.id);
  dead_.push_back(found->second);
  registry_.sessions.erase(found);
  refits_.on_session_end(session);
  session.tickets.clear();
  if (!kernel_.dying()) links_.at(session.id)->closed_by_daemon = true;
}

void Daemon::end_overrun_sessions() {
  while (!overrun_.empty()) {
    const auto session = registry_.find(overrun_.back());
    overrun_.pop_back();
    if (session != nullptr) end_session(*session);
  }
}

void Daemon::bury() {
  for (const auto& session : dead_) {
    for (auto& [name, module] : session->modules)
      registrar_.drop_later(std::move(module->registration));
    session->modules.clear();
    links_.erase(session->id);
  }
  dead_.clear();
}

}  // namespace refit::sim
