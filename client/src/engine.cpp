// Engine's calls: registration, and the waiting at its gate. What the words mean stands in
// gate.cpp.
#include "refit/engine.hpp"

#include <sys/epoll.h>
#include <sys/timerfd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <ctime>
#include <thread>

#include "bound_engines.hpp"
#include "gate.hpp"
#include "ipc/waiting.hpp"
#include "reconnect.hpp"
#include "requests.hpp"

namespace refit {

class Engine::Impl final : public BoundEngine {
 public:
  using Clock = Deadline::Clock;

  Impl(std::string name, ConnectOptions options)
      : name_(std::move(name)),
        options_(std::move(options)),
        back_(Role::engine, name_, options_) {}
  ~Impl() override {
    stop_serving();
    auto& bound = bound_engines();
    std::erase(bound, this);
  }

  Result<void> attach(Deadline deadline) {
    REFIT_TRY_ASSIGN(auto session, Session::connect(Role::engine, name_, options_, deadline));
    // One epoll fd for the engine's life: the owner of fd() keeps it across daemons.
    epoll_ = UniqueFd::adopt(::epoll_create1(EPOLL_CLOEXEC));
    if (!epoll_) return fail_os("epoll_create1", errno);
    timer_ = UniqueFd::adopt(::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK));
    if (!timer_) return fail_os("timerfd_create", errno);
    epoll_event event{};
    event.events = EPOLLIN;
    if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, timer_.get(), &event) != 0)
      return fail_os("epoll_ctl", errno);
    adopt(std::move(session));
    watch();
    if (failure_) return Unexpected(*failure_);
    return {};
  }

  Result<void> reconnect(Deadline deadline) {
    REFIT_TRY(not_served());
    if (session_ != nullptr) {
      // The old daemon's last word counts only once it cannot write any more.
      if (!session_->daemon_dead() && !gate_.withdraw()) {
        return fail(Errc::busy,
                    "engine " + name_ + ": the daemon is writing; it must commit or die first");
      }
      let_go();
    }
    failure_.reset();
    start_over();
    auto back = be_connected(deadline);
    if (!back && !options_.reconnect) back_.start({});  // no half of a session stays behind
    return back;
  }

  Result<void> sleep(Deadline deadline) {
    return calling(deadline, [&]() -> Result<void> {
      if (gate_.holding() && !gate_.withdraw())
        return fail(Errc::busy, "engine " + name_ + " is being written; sleep after poll()");
      auto& fbb = session_->builder();
      fbb.Finish(wire::CreateSleep(fbb));
      REFIT_TRY(session_->call(wire::Opcode::sleep, deadline, Expect::long_running));
      gate_.fall_asleep();
      return {};
    });
  }

  Result<void> wake(Deadline deadline) {
    return calling(deadline, [&]() -> Result<void> {
      auto& fbb = session_->builder();
      fbb.Finish(wire::CreateWake(fbb));
      REFIT_TRY(session_->call(wire::Opcode::wake, deadline, Expect::brief));
      gate_.wake();
      return {};
    });
  }

  Result<void> register_module(const ModuleSpec& spec, Deadline deadline) {
    return calling(deadline, [&]() -> Result<void> {
      // What is told of the module's bytes must not be older than what a refit does to them
      // meanwhile.
      if (gate_.holding() && !gate_.withdraw()) {
        return fail(Errc::busy, "engine " + name_ + " is being written; register " + spec.name() +
                                    " after poll()");
      }
      return register_now(spec, gate_.held(spec.name()), deadline);
    });
  }

  Result<void> unregister_module(const std::string& module, Deadline deadline) {
    return calling(deadline, [&]() -> Result<void> {
      REFIT_TRY(refit::unregister_module(*session_, module, deadline));
      gate_.remove(module);
      return {};
    });
  }

  Result<std::optional<GateEvent>> poll(Deadline deadline) {
    if (fd_taken_ && session_ != nullptr) {
      session_->drain_doorbell();
      if (nudged_) arm(Clock::time_point::max());
      nudged_ = false;
    }
    if (auto event = gate_.take_event()) return event;
    if (session_ != nullptr && !gate_.due() && !gate_.holding()) {
      // Nothing wakes a loop that only polls when the daemon dies, so it looks now and then; the
      // owner of fd() is woken and looks each time.
      if (!fd_taken_ && !look_is_due()) return std::nullopt;
      REFIT_TRY(not_served());
      REFIT_TRY(look());
      if (session_ != nullptr) return std::nullopt;
    }
    REFIT_TRY(not_served());
    if (session_ == nullptr) {
      REFIT_TRY(come_back_a_bit());
      if (session_ == nullptr || !gate_.due()) return std::nullopt;
    }
    return hold(deadline, -1);
  }

  Result<std::optional<GateEvent>> wait(Deadline deadline) {
    REFIT_TRY(not_served());
    std::uint32_t reads = 0;
    for (;;) {
      if (auto event = gate_.take_event()) return event;
      if (session_ == nullptr) {
        REFIT_TRY(come_back_a_bit());
        if (session_ != nullptr) continue;
        if (deadline.passed()) return std::nullopt;
        wait_to_come_back(deadline, -1);
        continue;
      }
      if (gate_.due() || gate_.holding()) {
        REFIT_TRY_ASSIGN(auto event, hold(deadline, -1));
        if (event) return event;
        continue;
      }
      if (deadline.passed()) return std::nullopt;
      if (session_->waiting() == Waiting::always) {
        const Awake reading(session_->request_region());
        while (!gate_.due() && ++reads % kReadsPerLook != 0) cpu_relax();
        if (gate_.due()) continue;
      } else {
        pollfd fds[] = {{session_->doorbell_fd(), POLLIN, 0},
                        {session_->pidfd(), POLLIN, 0},
                        {session_->socket_fd(), POLLRDHUP, 0}};
        const int count = ::poll(fds, 3, deadline.remaining_ms());
        if (count < 0 && errno != EINTR) return fail_os("poll", errno);
        if (count <= 0) continue;
        if (fds[0].revents != 0) session_->drain_doorbell();
        if ((fds[1].revents | fds[2].revents) == 0) continue;
      }
      REFIT_TRY(look());
    }
  }

  int fd() noexcept {
    fd_taken_ = true;
    nudge_if_due();
    return epoll_.get();
  }

  Result<void> serve(GateHandler handler) {
    REFIT_TRY(not_served());
    if (session_ == nullptr && !options_.reconnect) return Unexpected(gone_error());
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
    // The daemon may count this engine as back before this side does.
    if (session_ == nullptr) return recover();
    // Drained even when nothing is due: a leftover ring would keep the waiting trainer awake.
    session_->drain_doorbell();
    const Gate::Progress before = gate_.holding() ? Gate::Progress::holding : Gate::Progress::idle;
    return gate_.pump() != before;
  }
  [[nodiscard]] bool due() const override { return gate_.due(); }
  void append_fds(std::vector<pollfd>& fds) const override {
    if (session_ == nullptr) return back_.append_fds(fds);
    fds.push_back({session_->doorbell_fd(), POLLIN, 0});
  }

  bool recover() override {
    if (!options_.reconnect || failure_ || serving_.joinable()) return false;
    if (session_ != nullptr) {
      session_->drain_doorbell();
      gate_.pump();
      if (session_->check_alive()) return false;
      socket_over_ = true;
      // A daemon that only closed the session may still be writing.
      if (!session_->daemon_dead() && !gate_.withdraw()) return false;
      lose_daemon();
    }
    return come_back_a_bit().has_value() && session_ != nullptr;
  }
  void append_recovery_fds(std::vector<pollfd>& fds) const override {
    if (session_ == nullptr) return back_.append_fds(fds);
    fds.push_back({session_->doorbell_fd(), POLLIN, 0});
    fds.push_back({session_->pidfd(), POLLIN, 0});
    if (!socket_over_) fds.push_back({session_->socket_fd(), POLLRDHUP, 0});
  }
  [[nodiscard]] Clock::time_point next_recovery() const override {
    const bool coming_back = session_ == nullptr && options_.reconnect && !failure_;
    return coming_back ? back_.next_attempt() : Clock::time_point::max();
  }

  [[nodiscard]] const Gate& gate() const noexcept { return gate_; }
  [[nodiscard]] bool connected() const noexcept { return connected_.load(); }

 private:
  Result<void> not_served() const {
    if (serving_.joinable())
      return fail(Errc::busy,
                  "engine " + name_ + " is served by its own thread; stop_serving() first");
    return {};
  }

  /// True every 10 ms by the coarse clock, which costs no system call and no time stamp counter.
  bool look_is_due() {
    constexpr std::int64_t kLookEveryMs = 10;
    timespec now{};
    ::clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
    const std::int64_t ms = now.tv_sec * 1'000 + now.tv_nsec / 1'000'000;
    if (ms < next_look_ms_) return false;
    next_look_ms_ = ms + kLookEveryMs;
    return true;
  }

  /// Looks whether the session is over, and lets it go if it is. Errors: daemon_gone where this
  /// engine does not come back by itself.
  Result<void> look() {
    if (gate_.holding() || gate_.due() || session_->check_alive()) return {};
    Error gone = lose_daemon();
    if (!options_.reconnect) return Unexpected(std::move(gone));
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

  [[nodiscard]] Error gone_error() const {
    return {Errc::daemon_gone,
            0,
            "engine " + name_ + " has no daemon; reconnect() when one is there",
            {}};
  }

  /// The daemon is dead, or closed the session while it was not writing: keeps what the words said
  /// last, lets the session go and begins to come back. The error is for those who do that
  /// themselves.
  Error lose_daemon() {
    // Takes the reason that a daemon which lives may have left.
    [[maybe_unused]] const auto over = session_->check_alive();
    const bool dead = session_->daemon_dead();
    // What broke the protocol would break it again.
    if (session_->verdict()) failure_ = session_->verdict();
    let_go();
    start_over();
    return {
        Errc::daemon_gone,
        0,
        "engine " + name_ + ": the daemon " + (dead ? "died" : "closed this session") +
            (gate_.step_allowed() ? "; the weights are whole"
                                  : " while it was writing; no step may run until a refit commits"),
        {}};
  }

  void let_go() {
    connected_.store(false);
    unwatch();
    gate_.leave();
    gate_.detach();
    session_.reset();
    socket_over_ = false;
  }

  void start_over() {
    unwatch();
    std::vector<Reconnect::Module> modules;
    std::uint32_t words = 0;
    for (ModuleSpec& spec : gate_.specs()) {
      const HeldState held = gate_.held(spec.name());
      const auto buffers = static_cast<std::uint32_t>(spec.layer_buffers().size());
      modules.push_back({std::move(spec), held, words});
      words += buffers;
    }
    back_.start(std::move(modules), gate_.asleep());
    watch();
  }

  void adopt(std::unique_ptr<Session> session) {
    session_ = std::move(session);
    gate_.attach(session_.get());
    for (Reconnect::Module& module : back_.modules()) {
      if (module.held.asleep) {
        gate_.put_asleep(module.spec.name(), module.index);
      } else {
        gate_.put(std::move(module.spec), module.index, module.words);
      }
    }
    connected_.store(true);
  }

  /// Goes on coming back; session_ is set once that succeeded. Waits only for a daemon that was
  /// just sent something, and for that not long: the owner's loop has other work.
  Result<void> turn() {
    constexpr std::chrono::milliseconds kAnswerMax{5};
    if (failure_) return Unexpected(*failure_);
    if (Clock::now() < back_.next_attempt() && back_.next_attempt() != Clock::time_point::max())
      return {};
    unwatch();
    const Deadline patience = Deadline::in(kAnswerMax);
    auto step = back_.step();
    while (step && *step == Reconnect::Step::moved && !patience.passed()) {
      fds_.clear();
      back_.append_fds(fds_);
      wait_for(fds_, Clock::time_point::max(), patience);
      step = back_.step();
    }
    if (!step) {
      failure_ = std::move(step).error();
    } else if (*step == Reconnect::Step::done) {
      adopt(back_.take_session());
    }
    watch();
    if (failure_) return Unexpected(*failure_);
    nudge_if_due();
    return {};
  }

  /// turn() for those whose call is not about coming back.
  Result<void> come_back_a_bit() {
    if (!options_.reconnect) return Unexpected(gone_error());
    return turn();
  }

  Result<void> be_connected(Deadline deadline) {
    for (;;) {
      REFIT_TRY(turn());
      if (session_ != nullptr) return {};
      if (deadline.passed()) {
        return fail(Errc::daemon_gone,
                    "engine " + name_ + " has no daemon: " + back_.why_not_yet());
      }
      wait_to_come_back(deadline, -1);
    }
  }

  void wait_to_come_back(Deadline deadline, int stop_fd) {
    fds_.clear();
    back_.append_fds(fds_);
    fds_.push_back({stop_fd, POLLIN, 0});
    wait_for(fds_, back_.next_attempt(), deadline);
  }

  /// Makes `call` on a session, and again on the next one if the daemon went meanwhile.
  template <typename Call>
  Result<void> calling(Deadline deadline, Call&& call) {
    REFIT_TRY(not_served());
    for (;;) {
      if (session_ == nullptr) {
        if (!options_.reconnect) return Unexpected(gone_error());
        REFIT_TRY(be_connected(deadline));
      }
      Result<void> outcome = call();
      nudge_if_due();
      if (outcome || !options_.reconnect || deadline.passed()) return outcome;
      if (outcome.error().code == Errc::shutting_down) {
        session_->wait_for_end(Deadline::at(std::min(deadline.point(), Clock::now() + kDrainLook)));
        continue;
      }
      if (outcome.error().code != Errc::daemon_gone) return outcome;
      if (!session_->daemon_dead() && !gate_.withdraw()) return outcome;
      lose_daemon();
    }
  }

  /// Keeps the epoll set of fd() on what the next poll() waits for.
  void watch() {
    fds_.clear();
    auto next = Clock::time_point::max();
    if (session_ != nullptr) {
      fds_.push_back({session_->doorbell_fd(), POLLIN, 0});
      fds_.push_back({session_->pidfd(), POLLIN, 0});
      fds_.push_back({session_->socket_fd(), POLLRDHUP, 0});
    } else if (options_.reconnect && !failure_) {
      back_.append_fds(fds_);
      next = back_.next_attempt();
    }
    for (const pollfd& entry : fds_) {
      epoll_event event{};
      event.events = static_cast<std::uint32_t>(entry.events);  // poll's bits are epoll's
      if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, entry.fd, &event) != 0)
        failure_ = fail_os("epoll_ctl", errno).value();
      watched_.push_back(entry.fd);
    }
    arm(next);
  }
  /// Before the fds are closed: a copy that a forked child keeps would stay in the set for ever.
  void unwatch() {
    for (const int fd : watched_) ::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr);
    watched_.clear();
  }
  /// A call of this engine's own may have taken the ring that was meant for its gate: then fd()
  /// must be readable by other means.
  void nudge_if_due() {
    if (!fd_taken_ || session_ == nullptr || !gate_.due()) return;
    nudged_ = true;
    arm(Clock::time_point::min());
  }
  void arm(Clock::time_point when) const {
    itimerspec spec{};
    if (when != Clock::time_point::max()) {
      const auto ns = std::max<std::int64_t>(
          1, std::chrono::nanoseconds(when.time_since_epoch()).count());  // 0 would disarm it
      spec.it_value = {ns / 1'000'000'000, ns % 1'000'000'000};
    }
    ::timerfd_settime(timer_.get(), TFD_TIMER_ABSTIME, &spec, nullptr);
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
    Error gone = lose_daemon();
    if (options_.reconnect || (event && gate_.step_allowed())) return event;
    return Unexpected(std::move(gone));
  }

  void serve_loop(const GateHandler& handler) {
    for (;;) {
      if (session_ == nullptr) {
        if (!come_back_a_bit()) return;
        if (session_ == nullptr) wait_to_come_back(Deadline::in(kForever), stop_.fd());
        if (stop_asked()) return;
        continue;
      }
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
      if ((fds[1].revents | fds[2].revents) != 0 && !look()) return;
    }
  }

  [[nodiscard]] bool stop_asked() const {
    pollfd entry{stop_.fd(), POLLIN, 0};
    return ::poll(&entry, 1, 0) > 0;
  }

  static constexpr std::uint32_t kReadsPerLook = 4096;
  static constexpr std::chrono::milliseconds kDrainLook{50};
  static constexpr std::chrono::seconds kHoldMax{30};
  static constexpr std::chrono::hours kForever{24};

  std::string name_;
  ConnectOptions options_;
  Reconnect back_;
  std::optional<Error> failure_;  ///< why this engine does not come back any more
  std::unique_ptr<Session> session_;
  Gate gate_;
  std::atomic<bool> connected_{false};
  bool socket_over_ = false;  ///< the daemon closed the session, but may still be writing
  UniqueFd epoll_;
  UniqueFd timer_;  ///< in the epoll set: the next attempt to come back
  std::vector<int> watched_;
  std::vector<pollfd> fds_;
  bool fd_taken_ = false;
  bool nudged_ = false;
  std::int64_t next_look_ms_ = 0;
  std::thread serving_;
  Doorbell stop_;
};

Engine::Engine(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Engine::~Engine() = default;
Engine::Engine(Engine&&) noexcept = default;
Engine& Engine::operator=(Engine&&) noexcept = default;

Result<Engine> Engine::connect(const std::string& name, const ConnectOptions& options,
                               Deadline deadline) {
  ConnectOptions here = options;
  if (here.socket_path.empty()) here.socket_path = default_socket_path();
  auto impl = std::make_unique<Impl>(name, std::move(here));
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
bool Engine::connected() const noexcept { return impl_->connected(); }
Result<void> Engine::reconnect(Deadline deadline) { return impl_->reconnect(deadline); }

}  // namespace refit
