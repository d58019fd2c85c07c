// The first refit of a plan: what it asks of the driver may take as long as that likes, and nobody
// else waits for it.
//
// Method: the daemon's test build hangs, or is stopped, where a background thread begins to prepare
// the copies.

#include <csignal>

#include "conformance/device_daemon_test.hpp"
#include "support/waiting_engine.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class CudaFirstRefit : public DeviceDaemonTest {
 protected:
  /// `armed` is an action. Two background threads, so that one may hang.
  explicit CudaFirstRefit(const std::string& armed) {
    reconnect_ = false;
    DaemonOptions how;
    how.test_build = true;
    how.point = "plan.prepare=" + armed;
    how.arguments = {"--check-threads", "2"};
    start(how);
  }

  Model source_ = device_model();
  Model target_ = device_model();
};

class HangingDriver : public CudaFirstRefit {
 protected:
  HangingDriver() : CudaFirstRefit("hang") {}
};

TEST_F(HangingDriver, HoldsNobodyButItsOwnRefit) {
  source_.fill(1);
  source_.settle();
  target_.settle();
  Engine engine = make_engine("flux", target_);
  auto host_target = model_of(small_tensors(), 7);
  Engine other = make_engine("other", *host_target);
  Trainer trainer = make_trainer(source_);
  auto host_source = model_of(small_tensors(), 3);
  Trainer host_trainer = make_trainer(*host_source);
  const WaitingEngine waiting(engine);
  const WaitingEngine waiting_too(other);
  // Twice: the second one waits for what the first one began.
  for (int i = 0; i < 2; ++i) {
    BackgroundRefit hanging(trainer, {kWhole}, Deadline::in(500ms));
    must(host_trainer.refit({"other", "transformer"}, soon()));
    EXPECT_TRUE(engine.step_allowed()) << "the engine was asked to hold still";
    EXPECT_EQ(code_of(hanging.outcome()), Errc::engine_not_ready) << text_of(hanging.outcome());
    EXPECT_NE(text_of(hanging.outcome()).find("copies of a new plan"), std::string::npos)
        << text_of(hanging.outcome());
  }
  EXPECT_EQ(waiting.events(), 0);
  EXPECT_EQ(engine.state("transformer"), ModuleState::initial);
  Observer observer = must(Observer::connect("observer", options(), soon()));
  must(observer.digest({"flux", "transformer", DigestKind::raw}, soon()));
  daemon_->kill_now();
}

class StoppedDaemon : public CudaFirstRefit {
 protected:
  StoppedDaemon() : CudaFirstRefit("stop") {}
  void go_on() { daemon_->send_signal(SIGCONT); }
  /// Says by its exit code whether it leaked anything of the driver's.
  void expect_good_end() {
    daemon_->send_signal(SIGTERM);
    EXPECT_EQ(daemon_->wait_end(20'000), 0);
  }
};

// Goal: what was prepared for a refit that is gone serves the next one, or nobody if its trainer
// went too.
TEST_F(StoppedDaemon, CopiesOfARefitThatIsGoneServeTheNextOneOrNobody) {
  source_.fill(1);
  source_.settle();
  target_.settle();
  {
    Engine engine = make_engine("flux", target_);
    const WaitingEngine waiting(engine);
    std::optional<Trainer> trainer(make_trainer(source_));
    {
      BackgroundRefit late(*trainer, {kWhole}, Deadline::in(300ms));
      ASSERT_TRUE(daemon_->wait_stopped(20'000));
      EXPECT_FALSE(late.outcome());
    }
    EXPECT_FALSE(target_.equals(source_));
    go_on();
    must(trainer->refit(kWhole, soon()));
    EXPECT_TRUE(target_.equals(source_));
  }
  expect_good_end();
}

TEST_F(StoppedDaemon, TrainerThatGoesMeanwhileLeavesNothingBehind) {
  source_.settle();
  target_.settle();
  {
    Engine engine = make_engine("flux", target_);
    const WaitingEngine waiting(engine);
    {
      Trainer trainer = make_trainer(source_);
      BackgroundRefit late(trainer, {kWhole}, Deadline::in(300ms));
      ASSERT_TRUE(daemon_->wait_stopped(20'000));
      EXPECT_FALSE(late.outcome());
    }
    go_on();
    source_.fill(2);
    source_.settle();
    Trainer trainer = make_trainer(source_);
    must(trainer.refit(kWhole, soon()));
    EXPECT_TRUE(target_.equals(source_));
  }
  expect_good_end();
}

}  // namespace
}  // namespace refit::test
