// What is left when an engine dies: its session is gone, the trainer gets a named error, the next
// engine of that name is served.
//
// The engine is a process of its own and is killed for real; the trainer lives in the test.

#include <signal.h>

#include "support/client_process.hpp"
#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class EngineDeath : public DaemonTest {
 protected:
  void start_engine(ClientProcess& process, const std::string& name) {
    ASSERT_EQ(process.ask("engine " + name + " " + socket_), "ok");
    ASSERT_EQ(process.ask("module transformer 7"), "ok");
  }

  /// The name is free again and a refit to its new holder works.
  void expect_next_engine_served(Trainer& trainer, const std::string& name) {
    auto target = model_of(small_tensors(), 3);
    Engine next = make_engine(name, *target);
    next.bind_to_this_thread();
    const auto report = trainer.refit({name, "transformer"}, soon());
    ASSERT_TRUE(report) << text_of(report);
    EXPECT_EQ(report->version, 1U);
    EXPECT_TRUE(target->equals(*source_));
  }

  std::unique_ptr<Model> source_ = model_of(small_tensors(), 55);
};

// Goal: an engine that dies while it holds at its gate fails the refit by name. Method: a second
// engine that never answers keeps the daemon in the gate until the first one is killed.
TEST_F(EngineDeath, InTheGateTellsTheTrainerAndFreesTheName) {
  start();
  auto other_target = model_of(small_tensors(), 8);
  auto other_before = model_of(small_tensors(), 8);
  Engine other = make_engine("b", *other_target);
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  start_engine(engine, "a");
  BackgroundRefit refit(sut, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  pollfd asked{other.fd(), POLLIN, 0};
  ASSERT_EQ(::poll(&asked, 1, 20'000), 1);
  engine.tell("poll 20000");
  std::this_thread::sleep_for(20ms);
  engine.kill_now();

  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());
  EXPECT_NE(text_of(refit.outcome()).find("engine a"), std::string::npos);
  EXPECT_TRUE(other_target->equals(*other_before));
  EXPECT_TRUE(other.step_allowed());
  expect_next_engine_served(sut, "a");
}

// Goal: an engine that dies while its bytes are written does not take the daemon or the trainer
// along. Method: the daemon stops inside `writing`, the engine is killed, the daemon goes on.
TEST_F(EngineDeath, InWritingTellsTheTrainerAndFreesTheName) {
  DaemonProcess& daemon = start_armed("writing.half=stop");
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  start_engine(engine, "flux");
  BackgroundRefit refit(sut, {{"flux", "transformer"}}, soon());
  while (engine.ask("poll 100") == "ok none") {
  }
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  EXPECT_EQ(engine.ask("state transformer"), "ok writing 0 stay");
  engine.kill_now();
  daemon.send_signal(SIGCONT);

  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());
  expect_next_engine_served(sut, "flux");
}

// Goal: the same for a copy that the pool does, whose end comes later than the engine's death is
// noticed.
TEST_F(EngineDeath, InALargeCopyTellsTheTrainerAndFreesTheName) {
  DaemonProcess& daemon = start_armed("writing.begun=stop");
  auto source = model_of(large_tensors(), 5);
  Trainer sut = make_trainer(*source);
  ClientProcess engine;
  ASSERT_EQ(engine.ask("engine flux " + socket_), "ok");
  ASSERT_EQ(engine.ask("large transformer 6"), "ok");
  BackgroundRefit refit(sut, {{"flux", "transformer"}}, soon());
  while (engine.ask("poll 100") == "ok none") {
  }
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  engine.kill_now();
  daemon.send_signal(SIGCONT);
  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());

  auto target = model_of(large_tensors(), 9);
  Engine next = make_engine("flux", *target);
  next.bind_to_this_thread();
  const auto report = sut.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_TRUE(target->equals(*source));
}

// Goal: one of two engines dies in `writing`: the other one is whole and committed, and the trainer
// is told whom it lost.
TEST_F(EngineDeath, OfOneOfTwoInWritingCommitsTheOther) {
  DaemonProcess& daemon = start_armed("writing.half=stop");
  auto target = model_of(small_tensors(), 8);
  Engine other = make_engine("b", *target);
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  start_engine(engine, "a");
  BackgroundRefit refit(sut, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  engine.tell("poll 20000");
  ASSERT_EQ(code_of(poll_until_event(other, Deadline::in(2s))), Errc::deadline);
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  engine.kill_now();
  daemon.send_signal(SIGCONT);

  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone);
  EXPECT_NE(text_of(refit.outcome()).find("engine a"), std::string::npos)
      << text_of(refit.outcome());
  const auto event = poll_until_event(other, soon());
  ASSERT_TRUE(event) << text_of(event);
  EXPECT_EQ(event->modules.front().version, 1U);
  EXPECT_TRUE(target->equals(*source_));
  EXPECT_TRUE(other.step_allowed());
}

}  // namespace
}  // namespace refit::test
