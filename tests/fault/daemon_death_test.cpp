// What is left when the daemon dies: old, new, or poisoned and said so; and how the same
// transaction makes it whole at the next daemon.
//
// The daemon's test build kills itself at a named point; WIFSIGNALED proves that it got there.
// Trainer and engine live in the test and reconnect only when the test says so, which lets it look
// at what is between; reconnect_test.cpp has those that come back by themselves.

#include <signal.h>
#include <sys/wait.h>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class DaemonDeath : public DaemonTest {
 protected:
  DaemonDeath() { reconnect_ = false; }

  static RefitOptions with(const TransactionId& id) {
    RefitOptions options;
    options.transaction = id;
    return options;
  }

  void expect_killed(DaemonProcess& daemon) {
    const auto status = daemon.wait_end(20'000);
    ASSERT_TRUE(status) << "the daemon never reached its point";
    ASSERT_TRUE(WIFSIGNALED(*status));
    ASSERT_EQ(WTERMSIG(*status), SIGKILL);
  }

  /// Sends `targets` into a daemon armed with `point`=kill and leaves the engine without a daemon.
  void die_at(const std::string& point, Engine& engine, std::vector<RefitTarget> targets) {
    Trainer trainer = make_trainer(*source_);
    if (second_source_) must(trainer.register_module(second_source_->spec(), soon()));
    BackgroundRefit refit(trainer, std::move(targets), soon(), id_);
    const auto event = poll_until_event(engine, soon());
    event_ = event ? std::optional<GateEvent>(*event) : std::nullopt;
    gone_ = code_of(event);
    expect_killed(*daemon_);
    EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone)
        << point << ": " << text_of(refit.outcome());
  }

  const TransactionId id_ = TransactionId::random();
  std::unique_ptr<Model> source_ = model_of(gapped_tensors(), kNewSeed);
  std::unique_ptr<Model> target_ = model_of(gapped_tensors(), kOldSeed);
  std::unique_ptr<Model> old_ = model_of(gapped_tensors(), kOldSeed);
  std::unique_ptr<Model> second_source_;
  std::optional<GateEvent> event_;
  Errc gone_ = Errc::ok;
};

// Goal: a daemon that dies in the middle of the bytes leaves a module that says so, and the same
// transaction at the next daemon makes it whole. Method: half of the bytes, then SIGKILL; the mix
// is looked at before it is mended.
TEST_F(DaemonDeath, InWritingPoisonsUntilTheSameTransactionMakesItWhole) {
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("writing.half", sut, {kWhole});
  EXPECT_EQ(gone_, Errc::daemon_gone);
  EXPECT_TRUE(is_mix(*target_, *old_, *source_)) << "the death left no mix: nothing was tested";
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
  EXPECT_EQ(sut.version("transformer"), 0U);
  // However often it is asked, and while nobody serves.
  EXPECT_EQ(code_of(sut.poll(Deadline::in(1ms))), Errc::daemon_gone);
  EXPECT_NE(code_of(sut.reconnect(Deadline::in(100ms))), Errc::ok);
  EXPECT_FALSE(sut.step_allowed());

  start();
  must(sut.reconnect(soon()));
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
  sut.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  const auto report = trainer.refit(kWhole, soon(), with(id_));
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_FALSE(report->replayed);
  EXPECT_EQ(report->version, 1U);
  EXPECT_TRUE(target_->equals(*source_));
  ASSERT_TRUE(poll_until_event(sut, soon()));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  EXPECT_EQ(sut.version("transformer"), 1U);
}

// Goal: an engine answers for a module whose registration it gave up but the daemon did: refits
// reach it, and so does poison. Method: the call times out at a stopped daemon, which registers
// when it wakes and dies in the middle of the bytes.
TEST_F(DaemonDeath, InWritingPoisonsAModuleWhoseRegistrationWasNeverAnswered) {
  DaemonProcess& daemon = start_armed("writing.half=kill");
  Engine sut = must(Engine::connect("flux", options(), soon()));
  daemon.send_signal(SIGSTOP);
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  ASSERT_EQ(code_of(sut.register_module(target_->spec(), Deadline::in(50ms))), Errc::deadline);
  daemon.send_signal(SIGCONT);
  Observer observer = must(Observer::connect("test", options(), soon()));
  ASSERT_TRUE(eventually([&] {
    const auto status = observer.status(soon());
    return status && !status->modules.empty() && status->modules.front().populated;
  }));
  die_at("writing.half", sut, {kWhole});
  EXPECT_TRUE(is_mix(*target_, *old_, *source_)) << "the death left no mix: nothing was tested";
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);

  start();
  must(sut.reconnect(soon()));
  EXPECT_FALSE(sut.step_allowed());
  sut.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_TRUE(target_->equals(*source_));
  ASSERT_TRUE(poll_until_event(sut, soon()));
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: a poisoned module takes nothing that would leave it a mix and call it whole.
TEST_F(DaemonDeath, PoisonedModuleRefusesAPartOfAnotherTransactionAndTakesAllOfIt) {
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("writing.half", sut, {kWhole});
  start();
  must(sut.reconnect(soon()));
  sut.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  RefitTarget part = kWhole;
  part.selection = {"a"};
  part.allow_unmatched = true;
  const auto refused = trainer.refit(part, soon());
  EXPECT_EQ(code_of(refused), Errc::poisoned) << text_of(refused);
  EXPECT_NE(text_of(refused).find(id_.to_string()), std::string::npos) << text_of(refused);
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_TRUE(is_mix(*target_, *old_, *source_));

  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_TRUE(target_->equals(*source_));
  ASSERT_TRUE(poll_until_event(sut, soon()));
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: the id that broke a module mends it only with the tensors that it wrote then.
TEST_F(DaemonDeath, PoisonedModuleRefusesAPartOfTheTransactionThatBrokeIt) {
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("writing.half", sut, {kWhole});
  start();
  must(sut.reconnect(soon()));
  sut.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  RefitTarget part = kWhole;
  part.selection = {"a"};
  const auto refused = trainer.refit(part, soon(), with(id_));
  EXPECT_EQ(code_of(refused), Errc::poisoned) << text_of(refused);
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_TRUE(is_mix(*target_, *old_, *source_));
}

// Goal: poison outlives a second daemon that does nothing about it, and a restart of that one too.
TEST_F(DaemonDeath, PoisonOutlivesDaemonsThatDoNotMendIt) {
  start_armed("writing.half=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("writing.half", sut, {kWhole});
  for (int restart = 0; restart < 2; ++restart) {
    start();
    must(sut.reconnect(soon()));
    EXPECT_FALSE(sut.step_allowed());
    Observer observer = must(Observer::connect("observer", options(), soon()));
    const DaemonStatus status = must(observer.status(soon()));
    ASSERT_EQ(status.modules.size(), 1U);
    EXPECT_EQ(status.modules[0].state, ModuleState::poisoned);
    EXPECT_EQ(status.modules[0].transaction, id_);
    daemon_->kill_now();
  }
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
}

// Goal: two modules of one transaction, dead between their two commit points: the first is new, the
// second says that it is not whole, and the same transaction makes both new.
TEST_F(DaemonDeath, BetweenTwoCommitsNeverLeavesAVersionThatLies) {
  start_armed("transaction.between_commits=kill");
  second_source_ = model_of(gapped_tensors(), kNewSeed + 1, "vae");
  auto second_target = model_of(gapped_tensors(), kOldSeed + 1, "vae");
  Engine sut = make_engine("flux", *target_);
  must(sut.register_module(second_target->spec(), soon()));
  const std::vector<RefitTarget> both{kWhole, {"flux", "vae"}};
  die_at("transaction.between_commits", sut, both);
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  EXPECT_EQ(sut.version("transformer"), 1U);
  EXPECT_EQ(sut.state("vae"), ModuleState::poisoned);
  EXPECT_EQ(sut.version("vae"), 0U);

  start();
  must(sut.reconnect(soon()));
  EXPECT_FALSE(sut.step_allowed());
  sut.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  must(trainer.register_module(second_source_->spec(), soon()));
  const auto report = trainer.refit_all(both, soon(), with(id_));
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_FALSE(report->replayed);
  ASSERT_TRUE(poll_until_event(sut, soon()));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(second_target->equals(*second_source_));
  EXPECT_GE(sut.version("transformer"), 1U);
  EXPECT_EQ(sut.version("vae"), 1U);
}

// Goal: the store of `committed` is the commit point: whoever dies after it, the weights are new
// and the transaction is known to be done.
TEST_F(DaemonDeath, AfterTheCommitKeepsTheNewVersionAndReplaysTheTransaction) {
  start_armed("transaction.committed=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("transaction.committed", sut, {kWhole});
  ASSERT_TRUE(event_) << "the engine was not told what was committed";
  EXPECT_EQ(event_->modules.front().version, 1U);
  EXPECT_EQ(event_->modules.front().transaction, id_);
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  EXPECT_EQ(sut.version("transformer"), 1U);
  EXPECT_EQ(code_of(sut.poll(Deadline::in(1ms))), Errc::daemon_gone);

  start();
  must(sut.reconnect(soon()));
  EXPECT_EQ(sut.version("transformer"), 1U);
  Trainer trainer = make_trainer(*source_);
  const auto replayed = trainer.refit(kWhole, soon(), with(id_));
  ASSERT_TRUE(replayed) << text_of(replayed);
  EXPECT_TRUE(replayed->replayed);
  EXPECT_EQ(replayed->version, 1U);
  EXPECT_FALSE(must(sut.poll(soon()))) << "a replay must not gate the engine";

  sut.bind_to_this_thread();
  const auto next = trainer.refit(kWhole, soon());
  ASSERT_TRUE(next) << text_of(next);
  EXPECT_EQ(next->version, 2U);
}

// Goal: all bytes were there, but `committed` was not stored: old or new is decided by the word
// alone, so the module is poisoned.
TEST_F(DaemonDeath, AfterTheLastByteButBeforeTheCommitPoisons) {
  start_armed("writing.done=kill");
  Engine sut = make_engine("flux", *target_);
  die_at("writing.done", sut, {kWhole});
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_EQ(gone_, Errc::daemon_gone);
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::poisoned);
}

// Goal: a daemon that dies before `writing` changes nothing, and the engine may step at once.
// Method: a second engine that never answers keeps the daemon in the gate, where it is killed.
TEST_F(DaemonDeath, InTheGateChangesNothing) {
  DaemonProcess& daemon = start();
  Model busy_model("transformer", gapped_tensors());
  Engine sut = make_engine("a", *target_);
  Engine busy = make_engine("b", busy_model);
  Trainer trainer = make_trainer(*source_);
  BackgroundRefit refit(trainer, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  BackgroundGate gate(sut, soon());
  ASSERT_TRUE(holds(sut));
  daemon.kill_now();
  EXPECT_EQ(code_of(gate.outcome()), Errc::daemon_gone) << text_of(gate.outcome());
  EXPECT_EQ(code_of(refit.outcome()), Errc::daemon_gone);
  EXPECT_TRUE(target_->equals(*old_));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::initial);
}

// Goal: versions and bytes go on across a daemon's death that happened between refits.
TEST_F(DaemonDeath, BetweenRefitsKeepsVersionsAcrossTheRestart) {
  start();
  Engine sut = make_engine("flux", *target_);
  sut.bind_to_this_thread();
  {
    Trainer trainer = make_trainer(*source_);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(trainer.refit(kWhole, soon()));
    daemon_->kill_now();
    EXPECT_EQ(code_of(trainer.refit(kWhole, soon())), Errc::daemon_gone);
  }
  start();
  must(sut.reconnect(soon()));
  EXPECT_EQ(sut.version("transformer"), 3U);
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  Trainer trainer = make_trainer(*source_);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_EQ(report->version, 4U);
}

}  // namespace
}  // namespace refit::test
