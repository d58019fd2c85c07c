// Clients that come back by themselves: a daemon dies, another takes its place, and neither the
// trainer's caller nor the engine's owner does anything about it.
//
// Trainer and engine live in the test, the engine on a thread of its own where its way of being
// asked needs one. Whether a thread may step is looked at while it steps: on whole weights only.

#include <poll.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <random>

#include "support/client_process.hpp"
#include "support/daemon_test.hpp"
#include "support/waiting_engine.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class Reconnect : public DaemonTest {
 protected:
  void expect_killed() {
    const auto status = daemon_->wait_end(20'000);
    ASSERT_TRUE(status) << "the daemon never reached its point";
    ASSERT_TRUE(WIFSIGNALED(*status));
  }

  std::unique_ptr<Model> source_ = model_of(gapped_tensors(), 71);
  std::unique_ptr<Model> target_ = model_of(gapped_tensors(), 70);
  std::unique_ptr<Model> old_ = model_of(gapped_tensors(), 70);
};

/// An engine that steps as fast as it can, and counts the steps that saw a mix. A step is a look at
/// all bytes, which must come from one fill.
class SteppingEngine {
 public:
  SteppingEngine(Engine& engine, const Model& target)
      : engine_(engine), target_(target), thread_([this] { run(); }) {}
  ~SteppingEngine() { stop(); }
  SteppingEngine(const SteppingEngine&) = delete;
  SteppingEngine& operator=(const SteppingEngine&) = delete;

  void stop() {
    stop_.store(true);
    if (thread_.joinable()) thread_.join();
  }
  [[nodiscard]] int mixes() const { return mixes_.load(); }
  [[nodiscard]] int steps() const { return steps_.load(); }
  [[nodiscard]] int errors() const { return errors_.load(); }
  /// The versions of all events, each as often as it came. After stop().
  [[nodiscard]] const std::vector<std::uint64_t>& versions() const { return versions_; }

 private:
  void run() {
    while (!stop_.load()) {
      const auto event = engine_.poll(Deadline::in(20s));
      if (!event) ++errors_;
      if (event && *event) versions_.push_back((*event)->modules.front().version);
      if (!engine_.step_allowed()) continue;
      ++steps_;
      if (!is_uniform()) ++mixes_;
      std::this_thread::yield();
    }
  }
  [[nodiscard]] bool is_uniform() const {
    for (std::size_t i = 0; i < target_.names().size(); ++i) {
      for (std::uint64_t k = 0; k < target_.bytes(i); k += 8) {
        if (std::memcmp(target_.data(i) + k, target_.data(0), 8) != 0) return false;
      }
    }
    return true;
  }

  Engine& engine_;
  const Model& target_;
  std::atomic<bool> stop_{false};
  std::atomic<int> mixes_{0}, steps_{0}, errors_{0};
  std::vector<std::uint64_t> versions_;
  std::thread thread_;
};

std::vector<TensorShape> integer_tensors() {
  return {{"a", DType::int64, {33}}, {"b", DType::int64, {65}}, {"c", DType::int64, {17}}};
}
void set_all(Model& model, std::int64_t value) {
  for (std::size_t i = 0; i < model.names().size(); ++i) {
    for (std::uint64_t k = 0; k < model.bytes(i); k += 8)
      std::memcpy(model.data(i) + k, &value, sizeof value);
  }
}

// Goal: a socket that is there before it is given to its group ends nobody's coming back: systemd
// makes one in these two steps. Method: the dead daemon's socket belongs to somebody else until the
// next daemon replaces it. As root, whom no mode keeps out.
TEST_F(Reconnect, SocketThatRefusesForAMomentIsAskedAgain) {
  start();
  Engine sut = make_engine("flux", *target_);
  daemon_->kill_now();
  ASSERT_EQ(::chown(socket_.c_str(), 65534, 65534), 0) << "this test needs root";
  ASSERT_TRUE(eventually([&] {
    const auto event = sut.poll(soon());
    EXPECT_TRUE(event) << text_of(event);
    return !event || !sut.connected();
  }));
  for (int i = 0; i < 20; ++i) {
    const auto event = sut.wait(Deadline::in(5ms));
    ASSERT_TRUE(event) << text_of(event);
  }
  start();
  EXPECT_TRUE(eventually([&] { return sut.poll(soon()) && sut.connected(); }));
}

TEST_F(Reconnect, IdleDaemonKilledAndRestartedTheNextRefitWorksAndVersionsGoOn) {
  start();
  Engine engine = make_engine("flux", *target_);
  engine.bind_to_this_thread();
  Trainer sut = make_trainer(*source_);
  std::uint64_t version = 0;
  for (int restart = 0; restart < 3; ++restart) {
    for (int i = 0; i < 2; ++i) {
      source_->fill(++version);
      const auto report = sut.refit(kWhole, soon());
      ASSERT_TRUE(report) << text_of(report);
      EXPECT_EQ(report->version, version);
      EXPECT_TRUE(target_->equals(*source_));
      EXPECT_TRUE(must(engine.poll(soon())));
      EXPECT_TRUE(engine.step_allowed());
      EXPECT_TRUE(engine.connected());
    }
    start();
  }
  EXPECT_TRUE(sut.ping(soon()));
  const auto digests = sut.digest({"flux", "transformer"}, soon());
  ASSERT_TRUE(digests) << text_of(digests);
  EXPECT_EQ(digests->version, version);
  EXPECT_EQ(digests->state, ModuleState::committed);
}

// Goal: a death in the middle of the bytes is mended by the very call that it hit. Method: half of
// the bytes, then SIGKILL; the engine's thread only polls, the trainer's only waits; between the
// daemons the mix is looked at.
TEST_F(Reconnect, RefitThatADeathInWritingHitReturnsSuccessFromTheNextDaemon) {
  start_armed("writing.half=kill");
  Engine engine = make_engine("flux", *target_);
  Trainer sut = make_trainer(*source_);
  BackgroundRefit refit(sut, {kWhole}, soon());
  BackgroundGate gate(engine, soon());
  expect_killed();
  ASSERT_TRUE(eventually([&] { return engine.state("transformer") == ModuleState::poisoned; }));
  EXPECT_TRUE(is_mix(*target_, *old_, *source_)) << "the death left no mix: nothing was tested";
  EXPECT_FALSE(engine.step_allowed());
  EXPECT_FALSE(engine.connected());

  start();
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_FALSE(refit.outcome()->replayed);
  EXPECT_EQ(refit.outcome()->version, 1U);
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_EQ(engine.state("transformer"), ModuleState::committed);
}

// Goal: the next daemon learns of a poisoned module what the dead one left: poisoned, by whom.
TEST_F(Reconnect, PoisonedModuleIsRegisteredAsItIs) {
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  const TransactionId id = TransactionId::random();
  reconnect_ = false;
  {
    Trainer trainer = make_trainer(*source_);
    BackgroundRefit refit(trainer, {kWhole}, soon(), id);
    BackgroundGate gate(sut, soon());
    expect_killed();
    EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone);
    EXPECT_TRUE(eventually([&] { return sut.state("transformer") == ModuleState::poisoned; }));
    gate.end();
  }
  start();
  ASSERT_TRUE(eventually([&] {
    EXPECT_FALSE(must(sut.poll(soon())));
    return sut.connected();
  }));
  EXPECT_FALSE(sut.step_allowed());
  Observer observer = must(Observer::connect("observer", options(), soon()));
  const DaemonStatus status = must(observer.status(soon()));
  ASSERT_EQ(status.modules.size(), 1U);
  EXPECT_EQ(status.modules[0].state, ModuleState::poisoned);
  EXPECT_EQ(status.modules[0].transaction, id);
}

TEST_F(Reconnect, RefitThatADeathAfterTheCommitHitIsAnsweredByReplay) {
  start_armed("transaction.committed=kill");
  Engine engine = make_engine("flux", *target_);
  Trainer sut = make_trainer(*source_);
  BackgroundRefit refit(sut, {kWhole}, soon());
  BackgroundGate gate(engine, soon());
  expect_killed();
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(engine.step_allowed());
  start();
  while (!engine.connected()) ASSERT_FALSE(must(engine.poll(soon()))) << "a replay gates nobody";
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_TRUE(refit.outcome()->replayed);
  EXPECT_EQ(refit.outcome()->version, 1U);
  EXPECT_TRUE(target_->equals(*source_));
}

// Goal: trainer and engine on one thread come back together from a death in writing. Method: the
// next daemon is started by another thread, once the first one is dead.
TEST_F(Reconnect, BoundEngineComesBackInsideTheTrainersCall) {
  start_armed("writing.half=kill");
  Engine engine = make_engine("flux", *target_);
  engine.bind_to_this_thread();
  Trainer sut = make_trainer(*source_);
  std::atomic<bool> over{false};
  std::thread operator_of_daemons([&] {
    expect_killed();
    start();
    eventually([&] { return over.load(); },
               60s);  // the daemon dies with the thread that started it
  });
  const auto report = sut.refit(kWhole, soon());
  over.store(true);
  operator_of_daemons.join();
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_EQ(report->version, 1U);
  EXPECT_TRUE(target_->equals(*source_));
  const auto event = must(engine.poll(soon()));
  ASSERT_TRUE(event);
  EXPECT_EQ(event->modules.front().version, 1U);
  EXPECT_TRUE(engine.step_allowed());
}

// Goal: an idle engine that sleeps in its own event loop on fd() comes back, and sleeps while there
// is nobody to come back to. Method: one fd for all of it; wake-ups without a daemon are counted.
TEST_F(Reconnect, EngineThatSleepsOnItsFdComesBack) {
  start();
  Engine sut = make_engine("flux", *target_);
  Trainer trainer = make_trainer(*source_);
  std::atomic<bool> stop{false};
  std::atomic<int> wakes{0}, errors{0};
  std::thread loop([&] {
    const int fd = sut.fd();
    while (!stop.load()) {
      pollfd entry{fd, POLLIN, 0};
      if (::poll(&entry, 1, 1'000) > 0) ++wakes;
      if (!sut.poll(soon())) ++errors;
    }
  });
  ASSERT_TRUE(trainer.refit(kWhole, soon()));
  daemon_->kill_now();
  ASSERT_TRUE(eventually([&] { return !sut.connected(); }));
  wakes.store(0);
  std::this_thread::sleep_for(500ms);
  EXPECT_GT(wakes.load(), 0) << "it does not look for a daemon";
  EXPECT_LT(wakes.load(), 50) << "it does not sleep";
  start();
  // Nobody asks it anything: it is back before the trainer is.
  EXPECT_TRUE(eventually([&] { return sut.connected(); }));
  const auto report = trainer.refit(kWhole, soon());
  EXPECT_TRUE(report) << text_of(report);
  EXPECT_EQ(report ? report->version : 0, 2U);
  stop.store(true);
  loop.join();
  EXPECT_EQ(errors.load(), 0);
}

TEST_F(Reconnect, ServedEngineComesBack) {
  start();
  Engine engine = make_engine("flux", *target_);
  Trainer trainer = make_trainer(*source_);
  {
    const WaitingEngine serving(engine);
    ASSERT_TRUE(trainer.refit(kWhole, soon()));
    start();
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << text_of(report);
    EXPECT_EQ(report->version, 2U);
    daemon_->kill_now();
    ASSERT_TRUE(eventually([&] { return !engine.connected(); }));
  }  // stop_serving() while it looks for a daemon
  EXPECT_EQ(engine.version("transformer"), 2U);
}

// Goal: whoever polls, waits and refits while no daemon comes gets its own deadline and a named
// reason; whole weights may be stepped on.
TEST_F(Reconnect, WithoutAnotherDaemonEveryCallEndsByItsDeadline) {
  start();
  Engine engine = make_engine("flux", *target_);
  engine.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  ASSERT_TRUE(trainer.refit(kWhole, soon()));
  must(engine.poll(soon()));
  daemon_->kill_now();
  for (int i = 0; i < 2; ++i) {
    const auto report = trainer.refit(kWhole, Deadline::in(100ms));
    EXPECT_EQ(code_of(report), Errc::daemon_gone);
    EXPECT_NE(text_of(report).find(socket_), std::string::npos) << text_of(report);
    EXPECT_EQ(code_of(trainer.ping(Deadline::in(10ms))), Errc::daemon_gone);
  }
  EXPECT_FALSE(must(engine.wait(Deadline::in(20ms))));
  EXPECT_FALSE(must(engine.poll(soon())));
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_EQ(engine.version("transformer"), 1U);
  const auto registered = engine.register_module(target_->spec(), Deadline::in(20ms));
  EXPECT_EQ(code_of(registered), Errc::daemon_gone);
  EXPECT_NE(text_of(registered).find(socket_), std::string::npos) << text_of(registered);
  start();
  EXPECT_TRUE(engine.register_module(target_->spec(), soon()));
  EXPECT_TRUE(trainer.register_module(source_->spec(), soon()));
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_EQ(report->version, 2U);
}

TEST_F(Reconnect, EngineThatStaysAwayIsWaitedForAndNamed) {
  start();
  std::optional<Engine> engine = make_engine("flux", *target_);
  engine->bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  ASSERT_TRUE(trainer.refit(kWhole, soon()));
  // On a session that nothing interrupted its end is told at once.
  engine.reset();
  Result<RefitReport> report = fail(Errc::ok, "");
  EXPECT_TRUE(eventually([&] {  // the daemon notices it in a moment
    report = trainer.refit(kWhole, soon());
    return code_of(report) == Errc::no_such_engine;
  })) << text_of(report);
  EXPECT_EQ(text_of(report).find("waited"), std::string::npos) << text_of(report);

  start();
  report = trainer.refit(kWhole, Deadline::in(500ms));
  // Whether the dead one wrote is not known.
  EXPECT_TRUE(code_of(report) == Errc::daemon_gone || code_of(report) == Errc::deadline);
  EXPECT_NE(text_of(report).find("flux"), std::string::npos) << text_of(report);
  EXPECT_NE(text_of(report).find("waited"), std::string::npos) << text_of(report);
  const auto digests = trainer.digest({"flux", "transformer"}, Deadline::in(500ms));
  EXPECT_FALSE(digests);
  EXPECT_NE(text_of(digests).find("waited"), std::string::npos) << text_of(digests);
  // One that this trainer never knew is not waited for.
  const auto unknown = trainer.digest({"nobody", "transformer"}, soon());
  EXPECT_EQ(code_of(unknown), Errc::no_such_engine);
  EXPECT_EQ(text_of(unknown).find("waited"), std::string::npos) << text_of(unknown);
}

TEST_F(Reconnect, TurnedOffLeavesItToTheCaller) {
  reconnect_ = false;
  start();
  Engine engine = make_engine("flux", *target_);
  engine.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  ASSERT_TRUE(trainer.refit(kWhole, soon()));
  must(engine.poll(soon()));
  start();
  EXPECT_EQ(code_of(trainer.refit(kWhole, soon())), Errc::daemon_gone);
  EXPECT_EQ(code_of(trainer.ping(soon())), Errc::daemon_gone);
  EXPECT_EQ(code_of(engine.wait(soon())), Errc::daemon_gone);
  EXPECT_EQ(code_of(engine.poll(soon())), Errc::daemon_gone);
  EXPECT_FALSE(engine.connected());
  EXPECT_TRUE(engine.step_allowed());
  must(engine.reconnect(soon()));
  EXPECT_TRUE(engine.connected());
  EXPECT_EQ(engine.version("transformer"), 1U);
}

// Goal: an engine whose name another session still holds at the new daemon comes back when that one
// goes. Method: a peer process takes the name first.
TEST_F(Reconnect, EngineWhoseNameIsTakenForAMomentComesBack) {
  start();
  Engine sut = make_engine("flux", *target_);
  daemon_->kill_now();
  start();
  ClientProcess other;
  ASSERT_EQ(other.ask("engine flux " + socket_), "ok");
  for (int i = 0; i < 50; ++i) {
    ASSERT_FALSE(must(sut.wait(Deadline::in(1ms))));
    ASSERT_FALSE(sut.connected());
  }
  other.kill_now();
  EXPECT_TRUE(eventually([&] {
    must(sut.poll(soon()));
    return sut.connected();
  }));
}

// Goal: a process that took the name and keeps it is an error, not a reason to ask for ever.
TEST_F(Reconnect, EngineWhoseNameStaysTakenIsToldWhoHoldsIt) {
  start();
  Engine sut = make_engine("flux", *target_);
  daemon_->kill_now();
  start();
  ClientProcess other;
  ASSERT_EQ(other.ask("engine flux " + socket_), "ok");

  Result<std::optional<GateEvent>> outcome = std::nullopt;
  EXPECT_TRUE(eventually([&] { return !(outcome = sut.wait(Deadline::in(10ms))); }));

  EXPECT_EQ(code_of(outcome), Errc::name_taken);
  EXPECT_NE(text_of(outcome).find("held by pid " + std::to_string(other.pid())), std::string::npos)
      << text_of(outcome);
  EXPECT_TRUE(sut.step_allowed()) << "its weights are whole all the same";
}

// Goal: what asking again cannot mend is not asked again. Method: the next daemon takes fewer
// tensors than the trainer holds; a call that has an hour comes back at once, or the test's own
// limit ends it.
TEST_F(Reconnect, RefusalByTheNextDaemonIsTheCallsError) {
  start();
  Trainer sut = make_trainer(*source_);
  daemon_->kill_now();
  const std::string file = directory_.path() + "/refitd.toml";
  std::ofstream(file) << "[limits]\ntensors_per_uid = 1\n";
  DaemonOptions how;
  how.arguments = {"--config", file};
  start(how);

  const auto outcome = sut.refit(kWhole, Deadline::in(1h));

  EXPECT_EQ(code_of(outcome), Errc::quota);
  EXPECT_NE(text_of(outcome).find("limits.tensors_per_uid in " + file), std::string::npos)
      << text_of(outcome);
}

// Goal: a daemon that is stopped is not dead: nobody leaves it while it may be writing; once it is
// killed everybody does.
TEST_F(Reconnect, DaemonStoppedInWritingIsNotLeftBeforeItIsKilled) {
  DaemonProcess& daemon = start_armed("writing.half=stop");
  Engine engine = make_engine("flux", *target_);
  Trainer trainer = make_trainer(*source_);
  BackgroundRefit refit(trainer, {kWhole}, soon());
  ASSERT_EQ(code_of(poll_until_event(engine, Deadline::in(500ms))), Errc::deadline);
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(code_of(engine.poll(Deadline::in(10ms))), Errc::deadline);
    EXPECT_EQ(code_of(engine.wait(Deadline::in(10ms))), Errc::deadline);
    EXPECT_TRUE(engine.connected());
    EXPECT_FALSE(engine.step_allowed());
  }
  BackgroundGate gate(engine, soon());
  daemon.kill_now();
  ASSERT_TRUE(eventually([&] { return !engine.connected(); }));
  EXPECT_EQ(engine.state("transformer"), ModuleState::poisoned);
  EXPECT_FALSE(engine.step_allowed());
  start();
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(engine.step_allowed());
}

TEST_F(Reconnect, IdleDaemonStoppedAndKilledIsReplacedUnderAWaitingRefit) {
  DaemonProcess& daemon = start();
  auto target = model_of(integer_tensors(), 1);
  auto source = model_of(integer_tensors(), 2);
  set_all(*target, 0);
  set_all(*source, 1);
  Engine engine = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  daemon.send_signal(SIGSTOP);
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  SteppingEngine stepping(engine, *target);
  BackgroundRefit refit(trainer, {kWhole}, soon());
  ASSERT_TRUE(eventually([&] { return stepping.steps() > 10; }));
  EXPECT_TRUE(engine.connected());
  start();  // kills the old one first
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  stepping.stop();
  EXPECT_EQ(stepping.mixes(), 0);
  EXPECT_EQ(stepping.errors(), 0);
  EXPECT_TRUE(target->equals(*source));
}

TEST_F(Reconnect, DrainingDaemonIsWaitedOutByTheCall) {
  DaemonProcess& daemon = start();
  Engine engine = make_engine("flux", *target_);
  const WaitingEngine serving(engine);
  Trainer sut = make_trainer(*source_);
  ASSERT_TRUE(sut.refit(kWhole, soon()));
  daemon.send_signal(SIGTERM);
  BackgroundRefit refit(sut, {kWhole}, soon());
  ASSERT_TRUE(daemon.wait_end(20'000));
  start();
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_EQ(refit.outcome()->version, 2U);
}

// Goal: twenty daemons, one after the other, under a trainer that refits without pause and an
// engine that steps without pause: every refit succeeds, every version is one more than the last,
// and no step sees a mix. Method: half of the daemons kill themselves at a named point of a refit,
// half are killed from outside at a random moment. A step looks at every byte.
TEST_F(Reconnect, TwentyRestartsLoseNoVersionAndLetNoStepSeeAMix) {
  const char* const points[] = {"writing.half=kill", "writing.done=kill",
                                "transaction.committed=kill", "writing.begun=kill"};
  auto target = model_of(integer_tensors(), 1);
  auto source = model_of(integer_tensors(), 2);
  set_all(*target, 0);
  start();
  Engine engine = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  SteppingEngine stepping(engine, *target);
  std::atomic<bool> stop{false};
  std::atomic<std::uint64_t> refits{0};
  std::thread training([&] {
    while (!stop.load()) {
      const std::uint64_t next = refits.load() + 1;
      set_all(*source, static_cast<std::int64_t>(next));
      const auto report = trainer.refit(kWhole, Deadline::in(60s));
      EXPECT_TRUE(report) << text_of(report);
      if (!report) break;
      EXPECT_EQ(report->version, next);
      refits.store(next);
    }
  });
  std::mt19937 random(20);
  for (int restart = 0; restart < 20; ++restart) {
    const std::uint64_t before = refits.load();
    if (restart % 2 == 0) {
      EXPECT_TRUE(eventually([&] { return refits.load() > before; }, 60s));
      std::this_thread::sleep_for(std::chrono::microseconds(random() % 3'000));
      daemon_->kill_now();
      start_armed(points[restart / 2 % 4]);
    } else {
      expect_killed();
      start();
    }
  }
  const std::uint64_t before = refits.load();
  EXPECT_TRUE(eventually([&] { return refits.load() > before; }, 60s));
  stop.store(true);
  training.join();
  stepping.stop();
  EXPECT_EQ(stepping.mixes(), 0);
  EXPECT_EQ(stepping.errors(), 0);
  EXPECT_TRUE(target->equals(*source));
  EXPECT_EQ(engine.version("transformer"), refits.load());
  const auto& versions = stepping.versions();
  EXPECT_EQ(versions.size(), refits.load()) << "an event was lost or came twice";
  EXPECT_TRUE(std::is_sorted(versions.begin(), versions.end()));
}

TEST_F(Reconnect, FiftyRestartsLeaveTheClientsFdsAndMapsAsTheyWere) {
  start();
  Engine engine = make_engine("flux", *target_);
  engine.bind_to_this_thread();
  [[maybe_unused]] const int fd = engine.fd();
  Trainer trainer = make_trainer(*source_);
  const auto round = [&] {
    start();
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << text_of(report);
    must(engine.poll(soon()));
  };
  for (int i = 0; i < 3; ++i) round();
  const std::size_t fds = count_fds(::getpid());
  const std::size_t maps = count_maps(::getpid());
  for (int i = 0; i < 50; ++i) round();
  EXPECT_EQ(count_fds(::getpid()), fds);
  EXPECT_LE(count_maps(::getpid()), maps);
  EXPECT_EQ(engine.version("transformer"), 53U);
}

}  // namespace
}  // namespace refit::test
