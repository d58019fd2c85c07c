// How a daemon begins and ends: one on a socket, a dead one's socket is taken over, SIGTERM drains.

#include <signal.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "support/daemon_test.hpp"
#include "support/program.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class DaemonLife : public DaemonTest {
 protected:
  DaemonLife() { reconnect_ = false; }

  std::unique_ptr<Model> source_ = model_of(small_tensors(), 31);
  std::unique_ptr<Model> target_ = model_of(small_tensors(), 30);
  std::unique_ptr<Model> old_ = model_of(small_tensors(), 30);

  void expect_exit(int code) {
    const auto status = daemon_->wait_end(20'000);
    ASSERT_TRUE(status) << "the daemon did not end";
    ASSERT_TRUE(WIFEXITED(*status));
    EXPECT_EQ(WEXITSTATUS(*status), code);
  }
};

TEST_F(DaemonLife, SecondDaemonOnTheSocketSaysSoAndTheFirstGoesOn) {
  start();
  Trainer trainer = make_trainer(*source_);
  const ProgramEnd second = run_refitd({"--socket", socket_});
  ASSERT_TRUE(WIFEXITED(second.status));
  EXPECT_EQ(WEXITSTATUS(second.status), 1);
  EXPECT_NE(second.output.find("already_running"), std::string::npos) << second.output;
  EXPECT_NE(second.output.find(socket_), std::string::npos) << second.output;
  EXPECT_TRUE(trainer.ping(soon()));
  EXPECT_TRUE(Trainer::connect("next", options(), soon()));
}

TEST_F(DaemonLife, SocketOfADeadDaemonIsTakenOver) {
  start();
  daemon_->kill_now();
  struct stat status {};
  ASSERT_EQ(::stat(socket_.c_str(), &status), 0) << "kill -9 left no socket: nothing was tested";
  const auto nobody = Trainer::connect("trainer", options(), soon());
  EXPECT_EQ(code_of(nobody), Errc::os);
  EXPECT_NE(text_of(nobody).find(socket_), std::string::npos);
  start();
  EXPECT_TRUE(Trainer::connect("trainer", options(), soon()));
}

// Goal: SIGTERM lets what runs finish and refuses what comes. Method: a refit of two engines waits
// for the second one, which answers only after the daemon was seen to drain.
TEST_F(DaemonLife, TerminationFinishesTheRunningRefitAndRefusesNewOnes) {
  start();
  auto late_target = model_of(small_tensors(), 30);
  Engine engine = make_engine("a", *target_);
  Engine late = make_engine("b", *late_target);
  Trainer trainer = make_trainer(*source_);
  Trainer other = make_trainer(*source_);
  BackgroundRefit refit(trainer, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  BackgroundGate gate(engine, soon());
  ASSERT_TRUE(holds(engine));
  daemon_->send_signal(SIGTERM);
  ASSERT_TRUE(eventually(
      [&] { return code_of(Trainer::connect("late", options(), soon())) == Errc::shutting_down; }));
  const auto refused = other.refit({"a", "transformer"}, soon());
  EXPECT_EQ(code_of(refused), Errc::shutting_down) << text_of(refused);
  EXPECT_TRUE(target_->equals(*old_));

  const auto event = poll_until_event(late, soon());
  ASSERT_TRUE(event) << text_of(event);
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_EQ(refit.outcome()->version, 1U);
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(late_target->equals(*source_));
  expect_exit(0);
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_EQ(code_of(other.ping(soon())), Errc::daemon_gone);
}

TEST_F(DaemonLife, TerminationCallsOffARefitThatNeverGetsItsEngine) {
  DaemonOptions how;
  how.arguments = {"--drain-timeout-ms", "100"};
  start(how);
  auto busy_target = model_of(small_tensors(), 30);
  Engine engine = make_engine("a", *target_);
  Engine busy = make_engine("b", *busy_target);
  Trainer trainer = make_trainer(*source_);
  BackgroundRefit refit(trainer, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  BackgroundGate gate(engine, soon());
  ASSERT_TRUE(holds(engine));
  daemon_->send_signal(SIGTERM);
  EXPECT_EQ(code_of(refit.outcome()), Errc::shutting_down) << text_of(refit.outcome());
  expect_exit(0);
  EXPECT_EQ(gate.version(), 0U);
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_TRUE(target_->equals(*old_));
}

// Goal: no signal ends a daemon in the middle of `writing`. Method: it is stopped there, gets two
// SIGTERMs while it sleeps, and is woken.
TEST_F(DaemonLife, TerminationInWritingFinishesTheWrite) {
  DaemonOptions how;
  how.test_build = true;
  how.point = "writing.half=stop";
  how.arguments = {"--drain-timeout-ms", "0"};
  DaemonProcess& daemon = start(how);
  Engine engine = make_engine("flux", *target_);
  Trainer trainer = make_trainer(*source_);
  BackgroundRefit refit(trainer, {{"flux", "transformer"}}, soon());
  BackgroundGate gate(engine, soon());
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  daemon.send_signal(SIGTERM);
  daemon.send_signal(SIGINT);
  daemon.send_signal(SIGCONT);
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(engine.step_allowed());
  expect_exit(0);
}

TEST_F(DaemonLife, SecondEngineOfANameIsToldWhoHoldsIt) {
  start();
  Engine engine = make_engine("flux", *target_);
  const auto second = Engine::connect("flux", options(), soon());
  EXPECT_EQ(code_of(second), Errc::name_taken);
  EXPECT_NE(text_of(second).find("pid " + std::to_string(::getpid())), std::string::npos)
      << text_of(second);
  engine.bind_to_this_thread();
  Trainer trainer = make_trainer(*source_);
  EXPECT_TRUE(trainer.refit({"flux", "transformer"}, soon()));
}

}  // namespace
}  // namespace refit::test
