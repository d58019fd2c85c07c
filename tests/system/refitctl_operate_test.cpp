// refitctl's commands that look at sessions and change the daemon, against a live one: sessions,
// names for scripts, drain.
//
// One thread, and one that Engine::serve() owns.
#include <fcntl.h>
#include <pty.h>
#include <sys/stat.h>

#include <array>

#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

class RefitctlOperate : public RefitctlSystem {};

/// A refit of engine0/transformer with its one tensor "a" that waits at the engine's gate: the
/// daemon has it when the constructor returns. It ends when the engine polls, or with somebody.
class StalledRefit {
 public:
  explicit StalledRefit(const std::string& socket_path) {
    auto memory = SharedMemory::allocate(kTensorBytes, "trainer");
    EXPECT_TRUE(memory);
    std::memset((*memory)->data(), '+', kTensorBytes);
    ModuleSpec spec("transformer");
    EXPECT_TRUE(spec.add("a", DType::uint8, {8, 8}, *memory, (*memory)->data()));
    auto trainer =
        Trainer::connect("stalled", {socket_path, Waiting::off, /*reconnect=*/false}, soon());
    auto observer = Observer::connect("watcher", {socket_path, Waiting::off}, soon());
    EXPECT_TRUE(trainer && observer && trainer->register_module(spec, soon()));
    trainer_.emplace(std::move(*trainer));
    thread_ = std::thread([this] { outcome_.emplace(trainer_->refit(target(), soon())); });
    for (const Deadline deadline = soon(); !is_in_flight(*observer);) {
      if (deadline.passed()) {
        ADD_FAILURE() << "the refit did not arrive";
        break;
      }
    }
  }
  ~StalledRefit() {
    if (thread_.joinable()) thread_.join();
  }
  StalledRefit(const StalledRefit&) = delete;
  StalledRefit& operator=(const StalledRefit&) = delete;

  static RefitTarget target() {
    RefitTarget target;
    target.engine = "engine0";
    target.module = "transformer";
    return target;
  }

  const Result<RefitReport>& outcome() {
    if (thread_.joinable()) thread_.join();
    return *outcome_;
  }

 private:
  static bool is_in_flight(Observer& observer) {
    const auto status = observer.status(soon());
    if (!status) return false;
    for (const SessionStatus& session : status->sessions) {
      if (session.name == "stalled") return session.in_flight == 1;
    }
    return false;
  }

  std::optional<Trainer> trainer_;
  std::optional<Result<RefitReport>> outcome_;
  std::thread thread_;
};

TEST_F(RefitctlOperate, SessionsShowsWhatEveryOneHolds) {
  daemon_->start();
  start_engine({"a", "b"});
  ASSERT_TRUE(refit_once({"a", "b"}, '+'));

  const Finished text = refitctl({"sessions"});
  const json root = parsed(refitctl({"sessions", "--json"}));

  EXPECT_EQ(text.status, 0) << text.err;
  for (const char* part : {"IN FLIGHT", "engine0", "trainer0", "refitctl", "observer"})
    EXPECT_TRUE(contains(text.out, part)) << part << "\n" << text.out;
  if (::geteuid() == 0) {
    EXPECT_TRUE(contains(text.out, "root (0)")) << text.out;
  }
  ASSERT_EQ(root.at("sessions").size(), 3U);
  for (const json& session : root.at("sessions")) {
    const bool tool = session.at("role") == "observer";
    EXPECT_EQ(session.at("uid"), ::geteuid());
    EXPECT_EQ(session.at("modules"), tool ? 0 : 1);
    EXPECT_EQ(session.at("regions"), tool ? 0 : 1);
    if (!tool) {
      EXPECT_EQ(session.at("pid"), ::getpid());
      EXPECT_GE(session.at("registered_bytes"), 2 * kTensorBytes);
      EXPECT_GT(session.at("age_us"), 0);
    }
    EXPECT_EQ(session.at("in_flight"), 0);
  }
}

TEST_F(RefitctlOperate, RequestInFlightIsShown) {
  daemon_->start();
  start_engine({"a"});
  StalledRefit refit(socket_path_);

  const json sut = parsed(refitctl({"sessions", "--json"}));
  engine_.reset();

  for (const json& session : sut.at("sessions"))
    EXPECT_EQ(session.at("in_flight"), session.at("role") == "trainer" ? 1 : 0) << session;
  EXPECT_EQ(refit.outcome().error().code, Errc::engine_gone);
}

TEST_F(RefitctlOperate, NamesAreForScripts) {
  daemon_->start();
  EXPECT_EQ(refitctl({"modules", "--names"}).out, "");
  start_engine({"z", "a\u202e"});

  const Finished modules = refitctl({"modules", "--names"});
  const Finished tensors = refitctl({"tensors", "engine0/transformer", "--names"});

  EXPECT_EQ(modules.status, 0) << modules.err;
  EXPECT_EQ(modules.out, "engine0/transformer\n");
  EXPECT_EQ(tensors.out, "z\na\\u{202e}\n");
  EXPECT_EQ(refitctl({"modules", "--names", "--json"}).status, 2);
}

TEST_F(RefitctlOperate, DrainEndsTheDaemonWell) {
  daemon_->start();
  const pid_t pid = daemon_->pid();

  const Finished sut = refitctl({"drain"});

  EXPECT_EQ(sut.status, 0) << sut.err;
  EXPECT_TRUE(contains(sut.out, "pid " + std::to_string(pid))) << sut.out;
  EXPECT_TRUE(contains(sut.out, "--wait")) << sut.out;
  EXPECT_TRUE(daemon_->ended_well());
}

TEST_F(RefitctlOperate, DrainWaitReturnsWhenTheDaemonHasEnded) {
  daemon_->start();
  const pid_t pid = daemon_->pid();

  const Finished sut = refitctl({"drain", "--wait", "--json"});

  EXPECT_EQ(sut.status, 0) << sut.err;
  const json root = parsed(sut);
  EXPECT_EQ(root.at("pid"), pid);
  EXPECT_EQ(root.at("ended"), true);
  EXPECT_GE(root.at("us"), 0);
  // Dead when the tool said so, and not only soon.
  siginfo_t info{};
  EXPECT_EQ(::waitid(P_PID, static_cast<id_t>(pid), &info, WEXITED | WNOHANG | WNOWAIT), 0);
  EXPECT_EQ(info.si_pid, pid);
  EXPECT_TRUE(daemon_->ended_well());
}

TEST_F(RefitctlOperate, DrainFinishesWhatRunsAndRefusesWhatComes) {
  // Goal: a refit that had begun before the drain commits, what comes after it is refused, and the
  // daemon ends after the first. Method: the engine answers its gate only when all that was seen.
  daemon_->start();
  start_engine({"a"});
  auto late = Trainer::connect("late", {socket_path_, Waiting::off, /*reconnect=*/false}, soon());
  ASSERT_TRUE(late);
  StalledRefit refit(socket_path_);

  const Finished drained = refitctl({"drain"});
  const auto refused = late->refit(StalledRefit::target(), soon());
  const Finished newcomer = refitctl({"status"});
  std::optional<GateEvent> event;
  for (const Deadline deadline = soon(); !event && !deadline.passed();) {
    auto polled = engine_->poll(soon());
    ASSERT_TRUE(polled) << polled.error().to_string();
    event = *polled;
  }

  EXPECT_EQ(drained.status, 0) << drained.err;
  EXPECT_EQ(refused.error().code, Errc::shutting_down);
  EXPECT_EQ(newcomer.status, 1);
  EXPECT_TRUE(contains(newcomer.err, "shutting_down")) << newcomer.err;
  ASSERT_TRUE(refit.outcome()) << refit.outcome().error().to_string();
  EXPECT_EQ(static_cast<char>(*bytes_of(0)), '+');
  EXPECT_TRUE(daemon_->ended_well());
}

TEST_F(RefitctlOperate, DrainThatTakesLongShowsItsProgressAndGoesOnWithoutTheTool) {
  // Goal: --timeout ends the tool and not the drain, and a person sees what it waits for. Method: a
  // refit waits at the gate of an engine that does not poll; standard error is a terminal.
  daemon_->start();
  start_engine({"a"});
  StalledRefit refit(socket_path_);
  int master = -1;
  int terminal = -1;
  ASSERT_EQ(::openpty(&master, &terminal, nullptr, nullptr, nullptr), 0);
  RunOptions options;
  options.err_fd = terminal;

  const Finished sut = refitctl({"drain", "--wait", "--timeout", "1.2"}, options);
  // All of it is there: the tool has ended.
  ::fcntl(master, F_SETFL, O_NONBLOCK);
  std::string shown;
  std::array<char, 8192> buffer{};
  for (ssize_t count = 0; (count = ::read(master, buffer.data(), buffer.size())) > 0;)
    shown.append(buffer.data(), static_cast<std::size_t>(count));
  ::close(terminal);
  ::close(master);
  daemon_->stop(SIGKILL);

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(shown, "1 request running")) << shown;
  EXPECT_TRUE(contains(shown, "has not ended yet")) << shown;
  EXPECT_TRUE(contains(shown, "ends by itself")) << shown;
  EXPECT_FALSE(refit.outcome());
}

TEST_F(RefitctlOperate, StrangerMayNotDrain) {
  if (::geteuid() != 0) GTEST_SKIP() << "NOT TESTED: only root can run the tool as another user";
  daemon_->start();
  ASSERT_EQ(::chmod(socket_path_.c_str(), 0666), 0);
  RunOptions options;
  options.as_nobody = true;

  const Finished sut = refitctl({"drain"}, options);

  EXPECT_EQ(sut.status, 4) << sut.err;
  EXPECT_TRUE(contains(sut.err, "uid 65534 may not drain")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "uid 0")) << sut.err;
  EXPECT_TRUE(contains(sut.err, "sudo refitctl drain")) << sut.err;
  EXPECT_EQ(refitctl({"status"}).status, 0);
}

}  // namespace
}  // namespace refit::test
