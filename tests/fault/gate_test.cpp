// The ways to share a process, a thread or a gate with a refit: each works or returns its named
// error, none hangs.
//
// A real daemon; trainer and engine live in this process.

#include <poll.h>

#include <mutex>

#include "support/daemon_test.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

class GateUse : public DaemonTest {
 protected:
  GateUse() { start(); }

  std::unique_ptr<Model> source_ = model_of(small_tensors(), 31);
  std::unique_ptr<Model> target_ = model_of(small_tensors(), 30);
  std::unique_ptr<Model> old_ = model_of(small_tensors(), 30);
};

TEST_F(GateUse, OneThreadForTrainerAndBoundEngineWorks) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  sut.bind_to_this_thread();
  for (std::uint64_t step = 1; step <= 50; ++step) {
    source_->fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << text_of(report);
    EXPECT_EQ(report->version, step);
    const auto event = must(sut.poll(soon()));
    ASSERT_TRUE(event);
    EXPECT_EQ(event->modules.front().version, step);
    EXPECT_TRUE(target_->equals(*source_));
    EXPECT_TRUE(sut.step_allowed());
  }
}

TEST_F(GateUse, OneThreadWithoutBindingReturnsItsNamedError) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  const auto report = trainer.refit(kWhole, Deadline::in(200ms));
  EXPECT_EQ(code_of(report), Errc::engine_not_ready) << text_of(report);
  EXPECT_NE(text_of(report).find("flux"), std::string::npos);
  EXPECT_TRUE(target_->equals(*old_));
  EXPECT_FALSE(must(sut.poll(soon())));
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: an engine on its own thread that steps as fast as it can sees whole weights in every step.
// Method: all tensors of a step must come from one fill, told by a seed that stands in the first.
TEST_F(GateUse, TwoThreadsNeverStepOnAMix) {
  const std::vector<TensorShape> shapes{{"a", DType::int64, {33}}, {"b", DType::int64, {65}}};
  Model source("transformer", shapes);
  Model target("transformer", shapes);
  const auto set_all = [&](Model& model, std::int64_t value) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      for (std::uint64_t k = 0; k < model.bytes(i); k += 8) {
        std::memcpy(model.data(i) + k, &value, sizeof value);
      }
    }
  };
  const auto is_uniform = [&](const Model& model) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      for (std::uint64_t k = 0; k < model.bytes(i); k += 8) {
        if (std::memcmp(model.data(i) + k, model.data(0), 8) != 0) return false;
      }
    }
    return true;
  };
  set_all(target, 0);
  Trainer trainer = make_trainer(source);
  Engine sut = make_engine("flux", target);
  std::atomic<bool> stop{false};
  std::atomic<int> mixes{0};
  std::atomic<int> events{0};
  std::thread engine([&] {
    while (!stop.load()) {
      const auto event = sut.poll(soon());
      if (event && *event) ++events;
      if (!sut.step_allowed() || !is_uniform(target)) ++mixes;
    }
  });
  for (std::int64_t step = 1; step <= 300; ++step) {
    set_all(source, step);
    const auto report = trainer.refit({"flux", "transformer"}, soon());
    EXPECT_TRUE(report) << text_of(report);
    if (!report) break;
  }
  stop.store(true);
  engine.join();
  EXPECT_EQ(mixes.load(), 0);
  EXPECT_EQ(events.load(), 300);
  EXPECT_TRUE(target.equals(source));
}

TEST_F(GateUse, IdleEngineIsWokenThroughItsFd) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  BackgroundRefit refit(trainer, {kWhole}, soon());
  std::optional<GateEvent> event;
  while (!event) {
    pollfd entry{sut.fd(), POLLIN, 0};
    ASSERT_EQ(::poll(&entry, 1, 20'000), 1) << "the idle engine was never woken";
    event = must(sut.poll(soon()));
  }
  EXPECT_TRUE(refit.outcome()) << text_of(refit.outcome());
  EXPECT_TRUE(target_->equals(*source_));
  // And it sleeps again: an fd that stays readable would be a busy loop.
  must(sut.poll(soon()));
  pollfd entry{sut.fd(), POLLIN, 0};
  EXPECT_EQ(::poll(&entry, 1, 50), 0);
}

TEST_F(GateUse, IdleEngineLearnsOfTheDaemonsDeathThroughItsFd) {
  reconnect_ = false;
  Engine sut = make_engine("flux", *target_);
  pollfd entry{sut.fd(), POLLIN, 0};
  must(sut.poll(soon()));  // takes what registering left in the fd
  daemon_->kill_now();
  Errc code = Errc::ok;
  // The socket closes a moment before the process counts as dead: more than one wake-up is fine.
  while (code == Errc::ok) {
    ASSERT_EQ(::poll(&entry, 1, 20'000), 1);
    code = code_of(sut.poll(soon()));
  }
  EXPECT_EQ(code, Errc::daemon_gone);
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: serve() holds the engine's loop for exactly the time of the refit. Method: the loop is a
// mutex that every step takes; a step on anything but whole weights is counted.
TEST_F(GateUse, ServeHoldsTheLoopAndReleasesItWithTheEvent) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  std::mutex loop;
  std::atomic<int> holds{0};
  std::atomic<int> releases{0};
  std::atomic<std::uint64_t> version{0};
  GateHandler handler;
  handler.hold = [&](Deadline) {
    loop.lock();
    ++holds;
    return true;
  };
  handler.release = [&](const GateEvent* event) {
    if (event != nullptr) version.store(event->modules.front().version);
    ++releases;
    loop.unlock();
  };
  must(sut.serve(handler));
  std::atomic<bool> stop{false};
  std::atomic<int> bad_steps{0};
  std::thread steps([&] {
    while (!stop.load()) {
      const std::lock_guard step(loop);
      if (!sut.step_allowed()) ++bad_steps;
    }
  });
  for (std::uint64_t step = 1; step <= 20; ++step) {
    source_->fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << text_of(report);
    EXPECT_TRUE(eventually([&] { return version.load() == step; }));
  }
  stop.store(true);
  steps.join();
  sut.stop_serving();
  EXPECT_EQ(bad_steps.load(), 0);
  EXPECT_EQ(holds.load(), 20);
  EXPECT_EQ(releases.load(), 20);
  EXPECT_TRUE(target_->equals(*source_));
}

TEST_F(GateUse, ServedLoopThatCannotHoldMakesTheRefitReturnItsNamedError) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  std::atomic<int> asked{0};
  GateHandler handler;
  handler.hold = [&](Deadline) {
    ++asked;
    return false;
  };
  handler.release = [](const GateEvent*) {};
  must(sut.serve(handler));
  const auto report = trainer.refit(kWhole, Deadline::in(200ms));
  EXPECT_EQ(code_of(report), Errc::engine_not_ready) << text_of(report);
  EXPECT_EQ(asked.load(), 1);
  EXPECT_TRUE(target_->equals(*old_));
  sut.stop_serving();
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: a serving thread whose loop refused the gate lets its session go when the daemon dies
// instead of asking for ever. Method: the fds of this process fall back.
TEST_F(GateUse, ServingThreadThatRefusedLetsGoOfADeadDaemon) {
  reconnect_ = false;
  Trainer trainer = make_trainer(*source_);
  const std::size_t fds_before = count_fds(::getpid());
  Engine sut = make_engine("flux", *target_);
  std::atomic<int> asked{0};
  GateHandler handler;
  handler.hold = [&](Deadline) {
    ++asked;
    return false;
  };
  handler.release = [](const GateEvent*) {};
  must(sut.serve(handler));
  const std::size_t fds_serving = count_fds(::getpid());
  EXPECT_EQ(code_of(trainer.refit(kWhole, soon())), Errc::engine_not_ready);
  EXPECT_EQ(asked.load(), 1);
  daemon_->kill_now();
  // Socket, pidfd and two doorbells at least; its epoll fd and the stop doorbell stay.
  EXPECT_TRUE(eventually([&] { return count_fds(::getpid()) + 4 <= fds_serving; }))
      << fds_before << " before, " << fds_serving << " serving, " << count_fds(::getpid());
  sut.stop_serving();
  EXPECT_EQ(code_of(sut.poll(soon())), Errc::daemon_gone);
  EXPECT_TRUE(sut.step_allowed());
}

// Goal: a step of ten seconds ends a short deadline with a named error and is waited for by a long
// one. The ten seconds are slept for real, once.
TEST_F(GateUse, StepOfTenSecondsIsRefusedByAShortDeadlineAndAwaitedByALongOne) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  std::atomic<bool> in_step{false};
  std::atomic<bool> step_over{false};
  std::thread engine([&] {
    in_step.store(true);
    std::this_thread::sleep_for(10s);
    step_over.store(true);
    EXPECT_TRUE(poll_until_event(sut, soon()));
  });
  ASSERT_TRUE(eventually([&] { return in_step.load(); }));
  const auto refused = trainer.refit(kWhole, Deadline::in(300ms));
  EXPECT_EQ(code_of(refused), Errc::engine_not_ready) << text_of(refused);
  EXPECT_FALSE(step_over.load());
  EXPECT_TRUE(target_->equals(*old_));
  const auto report = trainer.refit(kWhole, Deadline::in(40s));
  EXPECT_TRUE(step_over.load());
  engine.join();
  ASSERT_TRUE(report) << text_of(report);
  EXPECT_EQ(report->version, 1U);
  EXPECT_TRUE(target_->equals(*source_));
}

// Goal: an engine that tires of waiting for another one steps back, and nothing was changed.
// Method: the other engine never answers; the refit ends long before its own deadline, by the
// engine's word.
TEST_F(GateUse, EngineThatStepsBackEndsTheRefitAndKeepsItsWeights) {
  auto busy_model = model_of(small_tensors(), 40);
  auto busy_before = model_of(small_tensors(), 40);
  Engine sut = make_engine("a", *target_);
  Engine busy = make_engine("b", *busy_model);
  Trainer trainer = make_trainer(*source_);
  std::atomic<bool> done{false};
  std::thread engine([&] {
    while (!done.load()) {
      const auto event = sut.poll(Deadline::in(5ms));
      EXPECT_TRUE(event) << text_of(event);
      EXPECT_TRUE(!event || !*event);
      EXPECT_TRUE(sut.step_allowed());
    }
  });
  const auto report = trainer.refit_all({{"a", "transformer"}, {"b", "transformer"}}, soon());
  done.store(true);
  engine.join();
  EXPECT_EQ(code_of(report), Errc::engine_not_ready) << text_of(report);
  EXPECT_NE(text_of(report).find("stepped back"), std::string::npos) << text_of(report);
  EXPECT_TRUE(target_->equals(*old_));
  EXPECT_TRUE(busy_model->equals(*busy_before));
  EXPECT_EQ(sut.version("transformer"), 0U);
  EXPECT_FALSE(must(busy.poll(soon())));

  // The next question of the same engines is answered as if nothing had been.
  std::thread other([&] { EXPECT_TRUE(poll_until_event(busy, soon())); });
  std::thread again([&] { EXPECT_TRUE(poll_until_event(sut, soon())); });
  const auto next = trainer.refit_all({{"a", "transformer"}, {"b", "transformer"}}, soon());
  other.join();
  again.join();
  ASSERT_TRUE(next) << text_of(next);
  EXPECT_TRUE(target_->equals(*source_));
  EXPECT_TRUE(busy_model->equals(*source_));
}

// Goal: a request that an engine sends while the daemon reads for its gate's answer is not lost.
// Method: registrations race with refits that nobody answers, many times; a lost one would wait for
// its whole deadline.
TEST_F(GateUse, RegistrationDuringAGateIsAlwaysAnswered) {
  Trainer trainer = make_trainer(*source_);
  Engine sut = make_engine("flux", *target_);
  std::atomic<bool> stop{false};
  std::thread refits([&] {
    while (!stop.load()) (void)trainer.refit(kWhole, Deadline::in(1ms));
  });
  int answered = 0;
  for (int i = 0; i < 300; ++i) {
    const auto registered = sut.register_module(target_->spec(), Deadline::in(10s));
    if (!registered) {
      ADD_FAILURE() << "registration " << i << ": " << text_of(registered);
      break;
    }
    ++answered;
  }
  stop.store(true);
  refits.join();
  EXPECT_EQ(answered, 300);
}

}  // namespace
}  // namespace refit::test
