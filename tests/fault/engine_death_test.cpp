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

// Goal: an engine that dies while it is asked, or while it holds, fails the refit by name. Method:
// a third engine never answers, so that the daemon surely stays in the gate.
class EngineDeathInTheGate : public EngineDeath, public ::testing::WithParamInterface<bool> {};

TEST_P(EngineDeathInTheGate, TellsTheTrainerAndFreesTheName) {
  start();
  auto other_target = model_of(small_tensors(), 8);
  auto other_before = model_of(small_tensors(), 8);
  auto busy_target = model_of(small_tensors(), 8);
  Engine other = make_engine("b", *other_target);
  Engine busy = make_engine("c", *busy_target);
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  start_engine(engine, "a");
  if (GetParam()) engine.tell("wait 20000");
  BackgroundGate gate(other, soon());
  BackgroundRefit refit(sut, {{"a", "transformer"}, {"b", "transformer"}, {"c", "transformer"}},
                        soon());
  ASSERT_TRUE(holds(other));
  engine.kill_now();

  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());
  EXPECT_NE(text_of(refit.outcome()).find("engine a"), std::string::npos);
  EXPECT_TRUE(gate.end()) << text_of(gate.outcome());
  EXPECT_EQ(gate.version(), 0U);
  EXPECT_TRUE(other_target->equals(*other_before));
  EXPECT_TRUE(busy_target->equals(*other_before));
  EXPECT_TRUE(other.step_allowed());
  expect_next_engine_served(sut, "a");
}

INSTANTIATE_TEST_SUITE_P(Engine, EngineDeathInTheGate, ::testing::Values(false, true),
                         [](const auto& point) { return point.param ? "Holding" : "Asked"; });

// Goal: an engine that dies while the loop thread itself writes its few bytes takes neither daemon
// nor trainer along. Method: the daemon stops inside `writing`, the engine is killed, the daemon
// goes on. It commits before it can notice the death, so both ends of the refit are true; what
// counts is that the session is gone and the name is free.
TEST_F(EngineDeath, InAShortWriteEndsTheRefitAndFreesTheName) {
  DaemonProcess& daemon = start_armed("writing.half=stop");
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  start_engine(engine, "flux");
  BackgroundRefit refit(sut, {{"flux", "transformer"}}, soon());
  while (engine.ask("poll 200") == "ok none") {
  }
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  EXPECT_EQ(engine.ask("state transformer"), "ok writing 0 stay");
  engine.kill_now();
  daemon.send_signal(SIGCONT);

  const Errc code = code_of(refit.outcome());
  EXPECT_TRUE(code == Errc::ok || code == Errc::engine_gone) << text_of(refit.outcome());
  EXPECT_TRUE(eventually([&] {
    return code_of(sut.refit({"flux", "transformer"}, soon())) == Errc::no_such_engine;
  }));
  expect_next_engine_served(sut, "flux");
}

/// Copies that the pool does: the engine's death is noticed while they run.
class EngineDeathInALargeCopy : public EngineDeath {
 protected:
  EngineDeathInALargeCopy() { source_ = model_of(large_tensors(), 5); }
};

TEST_F(EngineDeathInALargeCopy, TellsTheTrainerAndFreesTheName) {
  DaemonProcess& daemon = start_armed("writing.begun=stop");
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  ASSERT_EQ(engine.ask("engine flux " + socket_), "ok");
  ASSERT_EQ(engine.ask("large transformer 6"), "ok");
  BackgroundRefit refit(sut, {{"flux", "transformer"}}, soon());
  while (engine.ask("poll 200") == "ok none") {
  }
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  EXPECT_EQ(engine.ask("state transformer"), "ok writing 0 stay");
  engine.kill_now();
  daemon.send_signal(SIGCONT);
  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());

  auto target = model_of(large_tensors(), 9);
  Engine next = make_engine("flux", *target);
  next.bind_to_this_thread();
  const auto report = sut.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_TRUE(target->equals(*source_));
}

// Goal: one of two engines dies in `writing`: the other one is whole and committed, and the trainer
// is told whom it lost.
TEST_F(EngineDeathInALargeCopy, OfOneOfTwoCommitsTheOther) {
  DaemonProcess& daemon = start_armed("writing.begun=stop");
  auto target = model_of(large_tensors(), 8);
  Engine other = make_engine("b", *target);
  Trainer sut = make_trainer(*source_);
  ClientProcess engine;
  ASSERT_EQ(engine.ask("engine a " + socket_), "ok");
  ASSERT_EQ(engine.ask("large transformer 6"), "ok");
  BackgroundRefit refit(sut, {{"a", "transformer"}, {"b", "transformer"}}, soon());
  engine.tell("wait 20000");
  BackgroundGate gate(other, soon());
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  engine.kill_now();
  daemon.send_signal(SIGCONT);

  EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone);
  EXPECT_NE(text_of(refit.outcome()).find("engine a"), std::string::npos)
      << text_of(refit.outcome());
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(target->equals(*source_));
  EXPECT_TRUE(other.step_allowed());
}

}  // namespace
}  // namespace refit::test
