// Engine's calls: registration, and the waiting at its gate. What the words mean stands in
// gate.cpp.
#include "refit/engine.hpp"

#include <sys/epoll.h>

#include <algorithm>
#include <cerrno>
#include <thread>

#include "bound_engines.hpp"
#include "gate.hpp"
#include "ipc/waiting.hpp"
#include "requests.hpp"

namespace refit {

class Engine::Impl final : public BoundEngine {
 public:
  Impl(std::string name, ConnectOptions options)
      : name_(std::move(name)), options_(std::move(options)) {}
  ~Impl() override {
    stop_serving();
    auto& bound = bound_engines();
    std::erase(bound, this);
  }

  Result<void> attach(Deadline deadline) {
    REFIT_TRY_ASSIGN(auto session,
                     Session::connect(Role::engine, name_, options_, deadline, gate_.asleep()));
    // One epoll fd for the engine's life: the owner of fd() keeps it across daemons.
    if (!epoll_) epoll_ = UniqueFd::adopt(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll_) return fail_os("epoll_create1", errno);
    for (const auto& [fd, events] : {std::pair<int, std::uint32_t>{session->doorbell_fd(), EPOLLIN},
                                     {session->pidfd(), EPOLLIN},
                                     {session->socket_fd(), EPOLLRDHUP}}) {
      epoll_event event{};
      event.events = events;
      if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0)
        return fail_os("epoll_ctl", errno);
    }
    session_ = std::move(session);
    gate_.attach(session_.get());
    return {};
  }

  Result<void> reconnect(Deadline deadline) {
    if (serving_.joinable())
      return fail(Errc::busy, "engine " + name_ + ": stop_serving() before reconnect()");
    if (gate_.attached()) {
      // The old daemon's last word counts only once it cannot write any more.
      if (!session_->daemon_dead() && !gate_.withdraw()) {
        return fail(Errc::busy,
                    "engine " + name_ + ": the daemon is writing; it must commit or die first");
      }
      gate_.detach();
    }
    session_.reset();
    REFIT_TRY(attach(deadline));
    for (const ModuleSpec& spec : gate_.specs()) REFIT_TRY(register_held(spec, deadline));
    return {};
  }

  Result<void> sleep(Deadline deadline) {
    REFIT_TRY(ready_for_a_call());
    if (gate_.holding() && !gate_.withdraw())
      return fail(Errc::busy, "engine " + name_ + " is being written; sleep after poll()");
    auto& fbb = session_->builder();
    fbb.Finish(wire::CreateSleep(fbb));
    REFIT_TRY(session_->call(wire::Opcode::sleep, deadline, Expect::long_running));
    gate_.fall_asleep();
    return {};
  }

  Result<void> wake(Deadline deadline) {
    REFIT_TRY(ready_for_a_call());
    auto& fbb = session_->builder();
    fbb.Finish(wire::CreateWake(fbb));
    REFIT_TRY(session_->call(wire::Opcode::wake, deadline, Expect::brief));
    gate_.wake();
    return {};
  }

  Result<void> register_module(const ModuleSpec& spec, Deadline deadline) {
    REFIT_TRY(ready_for_a_call());
    // What is told of the module's bytes must not be older than what a refit does to them
    // meanwhile.
    if (gate_.holding() && !gate_.withdraw()) {
      return fail(Errc::busy, "engine " + name_ + " is being written; register " + spec.name() +
                                  " after poll()");
    }
    return register_now(spec, gate_.held(spec.name()), deadline);
  }

  Result<void> unregister_module(const std::string& module, Deadline deadline) {
    REFIT_TRY(ready_for_a_call());
    REFIT_TRY(refit::unregister_module(*session_, module, deadline));
    gate_.remove(module);
    return {};
  }

  Result<std::optional<GateEvent>> poll(Deadline deadline) {
    if (fd_taken_ && session_ != nullptr) session_->drain_doorbell();
    if (auto event = gate_.take_event()) return event;
    if (!gate_.due() && !gate_.holding()) {
      // Nothing wakes a loop that only polls when the daemon dies, so it looks now and then; the
      // owner of fd() is woken and looks each time.
      constexpr std::uint32_t kPollsPerLook = 4096;
      if (fd_taken_ || session_ == nullptr || ++polls_ % kPollsPerLook == 0) REFIT_TRY(alive());
      return std::nullopt;
    }
    REFIT_TRY(ready_for_a_call());
    return hold(deadline, -1);
  }

  Result<std::optional<GateEvent>> wait(Deadline deadline) {
    REFIT_TRY(ready_for_a_call());
    std::uint32_t reads = 0;
    for (;;) {
      if (auto event = gate_.take_event()) return event;
      if (gate_.due() || gate_.holding()) {
        REFIT_TRY_ASSIGN(auto event, hold(deadline, -1));
        if (event) return event;
      }
      if (deadline.passed()) return std::nullopt;
      if (session_->waiting() == Waiting::always) {
        const Awake reading(session_->request_region());
        while (!gate_.due() && ++reads % kReadsPerLook != 0) cpu_relax();
        if (!gate_.due()) REFIT_TRY(alive());
        continue;
      }
      pollfd fds[] = {{session_->doorbell_fd(), POLLIN, 0},
                      {session_->pidfd(), POLLIN, 0},
                      {session_->socket_fd(), POLLRDHUP, 0}};
      const int count = ::poll(fds, 3, deadline.remaining_ms());
      if (count < 0 && errno != EINTR) return fail_os("poll", errno);
      if (count <= 0) continue;
      if (fds[0].revents != 0) session_->drain_doorbell();
      if ((fds[1].revents | fds[2].revents) != 0 && !gate_.due()) return daemon_gone();
    }
  }

  int fd() noexcept {
    fd_taken_ = true;
    return epoll_.get();
  }

  Result<void> serve(GateHandler handler) {
    REFIT_TRY(ready_for_a_call());
    REFIT_TRY_ASSIGN(stop_, Doorbell::create());
    serving_ = std::thread([this, handler = std::move(handler)] { serve_loop(handler); });
    return {};
  }

  void stop_serving() noexcept {
    if (!serving_.joinable()) return;
    stop_.ring();
    serving_.join();
  }

  void bind() {
    auto& bound = bound_engines();
    if (std::find(bound.begin(), bound.end(), this) == bound.end()) bound.push_back(this);
  }

  // Pump: a trainer on the same thread lets this engine's gate through.
  bool pump() override {
    // Drained even when nothing is due: a leftover ring would keep the waiting trainer awake.
    if (session_ != nullptr) session_->drain_doorbell();
    const Gate::Progress before = gate_.holding() ? Gate::Progress::holding : Gate::Progress::idle;
    return gate_.pump() != before;
  }
  [[nodiscard]] bool due() const override { return gate_.due(); }
  void append_fds(std::vector<pollfd>& fds) const override {
    if (session_ != nullptr) fds.push_back({session_->doorbell_fd(), POLLIN, 0});
  }

  [[nodiscard]] const Gate& gate() const noexcept { return gate_; }

 private:
  Result<void> ready_for_a_call() {
    if (serving_.joinable())
      return fail(Errc::busy,
                  "engine " + name_ + " is served by its own thread; stop_serving() first");
    if (session_ == nullptr)
      return fail(Errc::daemon_gone,
                  "engine " + name_ + " has no daemon; reconnect() when one is there");
    return {};
  }

  /// Errc::daemon_gone, and everything that follows from it, if the session is over.
  Result<void> alive() {
    REFIT_TRY(ready_for_a_call());
    if (!gate_.holding() && !gate_.due() && !session_->check_alive()) return daemon_gone();
    return {};
  }

  Result<void> register_now(const ModuleSpec& spec, HeldState held, Deadline deadline) {
    held.asleep = false;
    REFIT_TRY_ASSIGN(const std::uint32_t words, gate_.free_words(spec));
    auto index = refit::register_module(*session_, spec, held, deadline, words);
    if (!index) {
      const Errc code = index.error().code;
      if (code == Errc::deadline || code == Errc::daemon_gone) gate_.put_in_doubt(spec, words);
      return Unexpected(std::move(index).error());
    }
    gate_.put(spec, *index, words);
    return {};
  }

  /// As it was: a module that sleeps is told without memory.
  Result<void> register_held(const ModuleSpec& spec, Deadline deadline) {
    const HeldState held = gate_.held(spec.name());
    if (!held.asleep) return register_now(spec, held, deadline);
    REFIT_TRY_ASSIGN(const std::uint32_t index,
                     refit::register_module(*session_, spec, held, deadline));
    gate_.put_asleep(spec.name(), index);
    return {};
  }

  /// The daemon is dead or closed the session: keeps what the words said last and lets the session
  /// go.
  Unexpected daemon_gone() {
    const bool dead = session_->daemon_dead();
    gate_.detach();
    session_.reset();
    return fail(Errc::daemon_gone,
                "engine " + name_ + ": the daemon " + (dead ? "died" : "closed this session") +
                    (gate_.step_allowed()
                         ? "; the weights are whole"
                         : " while it was writing; no step may run until a refit commits"));
  }

  /// Stays until the daemon releases the gate. `stop_fd`, if any, asks to step back.
  Result<std::optional<GateEvent>> hold(Deadline deadline, int stop_fd) {
    bool may_spin = session_->waiting() == Waiting::adaptive && !gate_.long_copy();
    bool socket_open = true;
    std::uint32_t reads = 0;
    for (;;) {
      gate_.pump();
      if (!gate_.holding()) return gate_.take_event();
      if (session_->waiting() == Waiting::always && !gate_.long_copy()) {
        const Awake reading(session_->request_region());
        while (!gate_.due() && ++reads % kReadsPerLook != 0) cpu_relax();
        if (gate_.due()) continue;
        if (session_->daemon_dead()) return after_death();
        if (!deadline.passed()) continue;
      } else if (may_spin) {
        may_spin = false;
        const Awake reading(session_->request_region());
        spin_briefly([&] { return gate_.due(); });
      }
      if (gate_.due()) continue;
      pollfd fds[] = {{session_->doorbell_fd(), POLLIN, 0},
                      {session_->pidfd(), POLLIN, 0},
                      {socket_open ? session_->socket_fd() : -1, POLLRDHUP, 0},
                      {stop_fd, POLLIN, 0}};
      const int count = ::poll(fds, 4, deadline.remaining_ms());
      if (count < 0 && errno != EINTR) return fail_os("poll", errno);
      if (fds[0].revents != 0) session_->drain_doorbell();
      if (gate_.due()) continue;
      if (fds[1].revents != 0) return after_death();
      if (fds[2].revents != 0) {
        // A daemon that closed the session may still be writing: then its word or its death is
        // awaited.
        socket_open = false;
        // A dying daemon's socket closes before its pidfd tells: what it committed counts here too.
        if (gate_.withdraw()) return after_death();
      }
      const bool stop_asked = stop_fd >= 0 && fds[3].revents != 0;
      if (stop_asked || deadline.passed()) {
        if (gate_.withdraw()) return gate_.take_event();
        if (!stop_asked) {
          return fail(
              Errc::deadline,
              "engine " + name_ + ": the daemon is writing; no step may run, call poll() again");
        }
        stop_fd = -1;
      }
    }
  }

  /// The daemon died while this engine held still. What it committed counts; what it was writing is
  /// poisoned.
  Result<std::optional<GateEvent>> after_death() {
    // Leaves the gate whatever the words say: nobody writes any more.
    gate_.leave();
    auto event = gate_.take_event();
    Unexpected gone = daemon_gone();
    if (event && gate_.step_allowed()) return event;
    return gone;
  }

  void serve_loop(const GateHandler& handler) {
    for (;;) {
      const std::uint64_t epoch = gate_.asked_epoch();
      if (epoch != 0) {
        if (!handler.hold(Deadline::in(kHoldMax))) {
          gate_.refuse(epoch);
          continue;
        }
        auto outcome = hold(Deadline::in(kForever), stop_.fd());
        handler.release(outcome && *outcome ? &**outcome : nullptr);
        if (!outcome) return;
        continue;
      }
      pollfd fds[] = {{session_->doorbell_fd(), POLLIN, 0},
                      {session_->pidfd(), POLLIN, 0},
                      {session_->socket_fd(), POLLRDHUP, 0},
                      {stop_.fd(), POLLIN, 0}};
      if (::poll(fds, 4, -1) < 0) continue;
      if (fds[3].revents != 0) return;
      if (fds[0].revents != 0) session_->drain_doorbell();
      if ((fds[1].revents | fds[2].revents) != 0 && !gate_.due()) {
        [[maybe_unused]] const Unexpected gone = daemon_gone();
        return;
      }
    }
  }

  static constexpr std::uint32_t kReadsPerLook = 4096;
  static constexpr std::chrono::seconds kHoldMax{30};
  static constexpr std::chrono::hours kForever{24};

  std::string name_;
  ConnectOptions options_;
  std::unique_ptr<Session> session_;
  Gate gate_;
  UniqueFd epoll_;
  bool fd_taken_ = false;
  std::uint32_t polls_ = 0;
  std::thread serving_;
  Doorbell stop_;
};

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Result<Engine> Engine::connect(const std::string& name, const ConnectOptions& options,
                               Deadline deadline) {
  auto impl = std::make_unique<Impl>(name, options);
  REFIT_TRY(impl->attach(deadline));
  return Engine(std::move(impl));
}

Result<void> Engine::register_module(const ModuleSpec& module, Deadline deadline) {
  return impl_->register_module(module, deadline);
}
Result<void> Engine::unregister_module(const std::string& module, Deadline deadline) {
  return impl_->unregister_module(module, deadline);
}
Result<void> Engine::sleep(Deadline deadline) { return impl_->sleep(deadline); }
Result<void> Engine::wake(Deadline deadline) { return impl_->wake(deadline); }
Result<std::optional<GateEvent>> Engine::poll(Deadline deadline) { return impl_->poll(deadline); }
Result<std::optional<GateEvent>> Engine::wait(Deadline deadline) { return impl_->wait(deadline); }
int Engine::fd() const noexcept { return impl_->fd(); }
Result<void> Engine::serve(GateHandler handler) { return impl_->serve(std::move(handler)); }
void Engine::stop_serving() noexcept { impl_->stop_serving(); }
void Engine::bind_to_this_thread() { impl_->bind(); }
bool Engine::step_allowed() const noexcept { return impl_->gate().step_allowed(); }
ModuleState Engine::state(const std::string& module) const { return impl_->gate().state(module); }
std::uint64_t Engine::version(const std::string& module) const {
  return impl_->gate().version(module);
}
Result<void> Engine::reconnect(Deadline deadline) { return impl_->reconnect(deadline); }

}  // namespace refit
