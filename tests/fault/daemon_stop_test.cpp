// A daemon that is stopped, not dead, in `writing`: no deadline makes its weights usable, and it
// commits when it wakes.

#include <signal.h>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class DaemonStop : public DaemonTest {
 protected:
  static RefitOptions with(const TransactionId& id) {
    RefitOptions options;
    options.transaction = id;
    return options;
  }
};

// Goal: as long as a stopped daemon may still write, every call returns by its own deadline and
// none of them lets a step run. Method: SIGSTOP inside `writing` (proven by wait_stopped), every
// deadline is let pass, then SIGCONT.
TEST_F(DaemonStop, LongerThanEveryDeadlineLetsNoStepRunAndCommitsWhenItWakes) {
  DaemonProcess& daemon = start_armed("writing.half=stop");
  auto source = model_of(gapped_tensors(), 2);
  auto target = model_of(gapped_tensors(), 1);
  auto old_bytes = model_of(gapped_tensors(), 1);
  Engine sut = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  const TransactionId id = TransactionId::random();
  BackgroundRefit refit(trainer, {{"flux", "transformer"}}, Deadline::in(1s), id);
  ASSERT_EQ(code_of(poll_until_event(sut, Deadline::in(600ms))), Errc::deadline);
  ASSERT_TRUE(daemon.wait_stopped(20'000)) << "the daemon never reached writing.half";
  EXPECT_TRUE(is_mix(*target, *old_bytes, *source));

  for (int i = 0; i < 5; ++i) {
    const auto event = sut.poll(Deadline::in(20ms));
    EXPECT_EQ(code_of(event), Errc::deadline) << text_of(event);
    EXPECT_EQ(code_of(sut.wait(Deadline::in(20ms))), Errc::deadline);
    EXPECT_FALSE(sut.step_allowed());
    EXPECT_EQ(sut.state("transformer"), ModuleState::writing);
  }
  EXPECT_EQ(code_of(sut.reconnect(Deadline::in(100ms))), Errc::busy)
      << "a daemon that may still write must not be left";
  EXPECT_EQ(code_of(refit.outcome()), Errc::deadline) << text_of(refit.outcome());
  EXPECT_FALSE(sut.step_allowed());

  daemon.send_signal(SIGCONT);
  const auto event = poll_until_event(sut, soon());
  ASSERT_TRUE(event) << text_of(event);
  EXPECT_EQ(event->modules.front().version, 1U);
  EXPECT_EQ(event->modules.front().transaction, id);
  EXPECT_TRUE(target->equals(*source));
  EXPECT_TRUE(sut.step_allowed());

  const auto again = trainer.refit({"flux", "transformer"}, soon(), with(id));
  ASSERT_TRUE(again) << text_of(again);
  EXPECT_TRUE(again->replayed);
  EXPECT_EQ(again->version, 1U);
}

// Goal: a transaction that is sent again while its first copy is still under way is one commit, not
// two. Method: the second request waits in the ring of a stopped daemon whose pool has yet to copy.
TEST_F(DaemonStop, TransactionSentAgainWhileItIsWrittenCommitsOnce) {
  DaemonProcess& daemon = start_armed("writing.begun=stop");
  auto source = model_of(large_tensors(), 2);
  auto target = model_of(large_tensors(), 1);
  Engine engine = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  const TransactionId id = TransactionId::random();
  {
    BackgroundRefit refit(trainer, {{"flux", "transformer"}}, Deadline::in(500ms), id);
    ASSERT_EQ(code_of(poll_until_event(engine, Deadline::in(1s))), Errc::deadline);
    ASSERT_TRUE(daemon.wait_stopped(20'000));
    ASSERT_EQ(code_of(refit.outcome()), Errc::deadline);
  }
  BackgroundRefit again(trainer, {{"flux", "transformer"}}, soon(), id);
  std::this_thread::sleep_for(50ms);
  daemon.send_signal(SIGCONT);
  ASSERT_TRUE(poll_until_event(engine, soon()));
  std::atomic<bool> done{false};
  std::thread gate([&] {
    while (!done.load()) (void)engine.wait(Deadline::in(10ms));
  });
  const auto& outcome = again.outcome();
  done.store(true);
  gate.join();
  ASSERT_TRUE(outcome) << text_of(outcome);
  EXPECT_TRUE(outcome->replayed);
  EXPECT_EQ(engine.version("transformer"), 1U);
  EXPECT_TRUE(target->equals(*source));
}

// Goal: a daemon stopped before it was asked anything keeps nobody: calls end by their deadline,
// the engine steps on.
TEST_F(DaemonStop, OutsideOfWritingKeepsNoEngineFromItsSteps) {
  DaemonProcess& daemon = start();
  auto source = model_of(gapped_tensors(), 2);
  auto target = model_of(gapped_tensors(), 1);
  Engine sut = make_engine("flux", *target);
  Trainer trainer = make_trainer(*source);
  daemon.send_signal(SIGSTOP);
  ASSERT_TRUE(daemon.wait_stopped(20'000));
  EXPECT_EQ(code_of(trainer.refit({"flux", "transformer"}, Deadline::in(100ms))), Errc::deadline);
  EXPECT_EQ(code_of(sut.poll(Deadline::in(10ms))), Errc::ok);
  EXPECT_TRUE(sut.step_allowed());
  EXPECT_EQ(code_of(Trainer::connect("other", options(), Deadline::in(100ms))), Errc::deadline);
  daemon.send_signal(SIGCONT);
  sut.bind_to_this_thread();
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << text_of(report);
}

}  // namespace
}  // namespace refit::test
