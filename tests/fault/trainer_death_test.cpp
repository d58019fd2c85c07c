// What is left when a trainer dies: before `writing` nothing was changed, after it the copy is
// finished and committed.
//
// The trainer is a process of its own and is killed for real; the engine lives in the test.

#include <signal.h>

#include "support/client_process.hpp"
#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class TrainerDeath : public DaemonTest {
 protected:
  bool trainer_is_known() {
    Observer observer = must(Observer::connect("observer", options(), soon()));
    const DaemonStatus status = must(observer.status(soon()));
    for (const SessionStatus& session : status.sessions) {
      if (session.role == Role::trainer) return true;
    }
    return false;
  }

  std::unique_ptr<Model> target_ = model_of(small_tensors(), kOldSeed);
  std::unique_ptr<Model> old_ = model_of(small_tensors(), kOldSeed);
  std::unique_ptr<Model> new_ = model_of(small_tensors(), kNewSeed);
};

class TrainerDeathAt : public TrainerDeath, public ::testing::WithParamInterface<const char*> {};

// Goal: a trainer's death in `writing` never costs the engine its weights. Method: the daemon stops
// at a named point inside `writing`, which proves the point was hit; the trainer is killed and
// taken away by the kernel; then the daemon goes on.
TEST_P(TrainerDeathAt, IsFinishedAndCommitted) {
  DaemonProcess& daemon = start_armed(std::string(GetParam()) + "=stop");
  Engine sut = make_engine("flux", *target_);
  ClientProcess trainer;
  ASSERT_EQ(trainer.ask("trainer t " + socket_), "ok");
  ASSERT_EQ(trainer.ask("module transformer " + std::to_string(kNewSeed)), "ok");
  trainer.tell("refit flux transformer 20000");

  BackgroundGate gate(sut, soon());
  ASSERT_TRUE(daemon.wait_stopped(20'000)) << "the daemon never reached " << GetParam();
  EXPECT_FALSE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::writing);
  trainer.kill_now();
  daemon.send_signal(SIGCONT);

  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(target_->equals(*new_));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.state("transformer"), ModuleState::committed);
  EXPECT_TRUE(eventually([&] { return !trainer_is_known(); }));
}

INSTANTIATE_TEST_SUITE_P(Writing, TrainerDeathAt,
                         ::testing::Values("writing.begun", "writing.half", "writing.done"),
                         [](const auto& point) {
                           std::string name = point.param;
                           name[name.find('.')] = '_';
                           return name;
                         });

// Goal: before `writing`, a trainer's death changes nothing and lets the engine go. Method: a
// second engine of the same transaction never answers, so that the daemon surely waits in the gate.
TEST_F(TrainerDeath, InTheGateChangesNothingAndLetsTheEngineGo) {
  start();
  Model other_target("transformer", small_tensors());
  Engine sut = make_engine("a", *target_);
  Engine busy = make_engine("b", other_target);
  ClientProcess trainer;
  ASSERT_EQ(trainer.ask("trainer t " + socket_), "ok");
  ASSERT_EQ(trainer.ask("module transformer " + std::to_string(kNewSeed)), "ok");
  trainer.tell("refit2 a b transformer 20000");
  BackgroundGate gate(sut, soon());
  ASSERT_TRUE(holds(sut));
  trainer.kill_now();
  ASSERT_TRUE(eventually([&] { return sut.step_allowed(); }));
  EXPECT_TRUE(gate.end()) << text_of(gate.outcome());
  EXPECT_EQ(gate.version(), 0U);
  EXPECT_TRUE(target_->equals(*old_));
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(sut.version("transformer"), 0U);
}

// Goal: bytes that a pool thread copies from a dead trainer's memory are its bytes. Method: a large
// model, so that the pool copies after the trainer is gone.
TEST_F(TrainerDeath, BeforeALargeCopyIsFinishedFromItsMemory) {
  DaemonProcess& daemon = start_armed("writing.begun=stop");
  auto target = model_of(large_tensors(), kOldSeed);
  auto expected = model_of(large_tensors(), kNewSeed);
  Engine sut = make_engine("flux", *target);
  ClientProcess trainer;
  ASSERT_EQ(trainer.ask("trainer t " + socket_), "ok");
  ASSERT_EQ(trainer.ask("large transformer " + std::to_string(kNewSeed)), "ok");
  trainer.tell("refit flux transformer 20000");
  BackgroundGate gate(sut, soon());
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  trainer.kill_now();
  daemon.send_signal(SIGCONT);
  EXPECT_EQ(gate.version(), 1U) << text_of(gate.outcome());
  EXPECT_TRUE(target->equals(*expected));
}

}  // namespace
}  // namespace refit::test
