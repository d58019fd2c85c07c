// Several modules, engines and trainers at once: all or nothing, taking turns, running in parallel,
// and what the daemon says of itself meanwhile.
//
// See refit_fixture.hpp for how the suite is built.

#include <thread>

#include "conformance/refit_fixture.hpp"
#include "support/effort.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

/// Two engines with two modules each, and one trainer that has both modules.
struct Fleet {
  Refit::Model source_dit{"transformer", small_tensors()};
  Refit::Model source_vae{"vae", gapped_tensors()};
  Refit::Model dit_a{"transformer", small_tensors()};
  Refit::Model vae_a{"vae", gapped_tensors()};
  Refit::Model dit_b{"transformer", small_tensors()};

  void fill(std::uint64_t seed) {
    source_dit.fill(seed);
    source_vae.fill(seed + 1000);
  }
  [[nodiscard]] bool holds_new() const {
    return dit_a.equals(source_dit) && vae_a.equals(source_vae) && dit_b.equals(source_dit);
  }
  static std::vector<RefitTarget> targets() {
    return {{"b", "transformer"}, {"a", "vae"}, {"a", "transformer"}};
  }
};

TEST_P(Refit, WritesModulesOfSeveralEnginesTogether) {
  Fleet fleet;
  Trainer trainer = make_trainer(fleet.source_dit);
  must(trainer.register_module(fleet.source_vae.spec(), soon()));
  Engine a = make_engine("a", fleet.dit_a);
  must(a.register_module(fleet.vae_a.spec(), soon()));
  Engine b = make_engine("b", fleet.dit_b);
  {
    const WaitingEngine waiting_a(a);
    const WaitingEngine waiting_b(b);
    for (std::uint64_t step = 1; step <= 5; ++step) {
      fleet.fill(step);
      const auto report = trainer.refit_all(Fleet::targets(), soon());
      ASSERT_TRUE(report) << report.error().to_string();
      EXPECT_EQ(report->version, step);
      EXPECT_EQ(report->tensors, 2 * small_tensors().size() + gapped_tensors().size());
      EXPECT_TRUE(fleet.holds_new());
    }
  }
  EXPECT_EQ(a.version("transformer"), 5U);
  EXPECT_EQ(a.version("vae"), 5U);
  EXPECT_EQ(b.version("transformer"), 5U);
}

TEST_P(Refit, OneEventNamesEveryModuleThatWasCommitted) {
  Fleet fleet;
  Trainer trainer = make_trainer(fleet.source_dit);
  must(trainer.register_module(fleet.source_vae.spec(), soon()));
  Engine a = make_engine("a", fleet.dit_a);
  must(a.register_module(fleet.vae_a.spec(), soon()));
  a.bind_to_this_thread();
  RefitOptions how;
  how.reset_caches = true;
  must(trainer.refit_all({{"a", "vae"}, {"a", "transformer"}}, soon(), how));
  const auto event = must(a.poll(soon()));
  ASSERT_TRUE(event);
  EXPECT_TRUE(event->reset_caches);
  ASSERT_EQ(event->modules.size(), 2U);
  EXPECT_FALSE(must(a.poll(soon()))) << "the same event twice";
}

// Goal: an engine that does not come to its gate keeps every other target unchanged.
TEST_P(Refit, OneEngineThatIsNotReadyKeepsAllOfThemOld) {
  Fleet fleet;
  fleet.fill(1);
  Trainer trainer = make_trainer(fleet.source_dit);
  must(trainer.register_module(fleet.source_vae.spec(), soon()));
  Engine a = make_engine("a", fleet.dit_a);
  must(a.register_module(fleet.vae_a.spec(), soon()));
  Engine b = make_engine("b", fleet.dit_b);
  const auto before_a = digests("a", "transformer");
  const auto before_vae = digests("a", "vae");
  const auto before_b = digests("b", "transformer");
  {
    const WaitingEngine waiting_a(a);
    const auto refused = trainer.refit_all(Fleet::targets(), Deadline::in(1500ms));
    EXPECT_EQ(code_of(refused), Errc::engine_not_ready) << text_of(refused);
    EXPECT_NE(text_of(refused).find("engine b"), std::string::npos) << text_of(refused);
    EXPECT_EQ(waiting_a.events(), 0);
  }
  EXPECT_EQ(digests("a", "transformer"), before_a);
  EXPECT_EQ(digests("a", "vae"), before_vae);
  EXPECT_EQ(digests("b", "transformer"), before_b);
  EXPECT_EQ(a.version("transformer"), 0U);
  EXPECT_TRUE(a.step_allowed());

  const WaitingEngine waiting_a(a);
  const WaitingEngine waiting_b(b);
  const auto report = trainer.refit_all(Fleet::targets(), soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(fleet.holds_new());
}

// Goal: one target that does not fit keeps all of them old, and every target's problems are in the
// one error.
TEST_P(Refit, MismatchesOfEveryTargetAreListedAndNothingIsWritten) {
  Fleet fleet;
  fleet.fill(1);
  Model odd_dit("transformer", {{"scale", DType::int32, {}}, {"only.here", DType::float32, {3}}});
  Model odd_vae("vae", {{"a", DType::float32, {34}}});
  Trainer trainer = make_trainer(fleet.source_dit);
  must(trainer.register_module(fleet.source_vae.spec(), soon()));
  Engine a = make_engine("a", fleet.dit_a);
  Engine b = make_engine("b", odd_dit);
  must(b.register_module(odd_vae.spec(), soon()));
  const auto before = digests("a", "transformer");
  const WaitingEngine waiting_a(a);
  const WaitingEngine waiting_b(b);
  const auto refused =
      trainer.refit_all({{"a", "transformer"}, {"b", "transformer"}, {"b", "vae"}}, soon());
  EXPECT_EQ(code_of(refused), Errc::manifest_mismatch) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"scale", "b/transformer", "trainer/transformer", "dtype"}))
      << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"only.here", "b/transformer"})) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"'a'", "b/vae", "trainer/vae", "shape"}))
      << text_of(refused);
  EXPECT_EQ(digests("a", "transformer"), before);
  EXPECT_EQ(waiting_a.events(), 0);
}

// Goal: an engine that is stuck does not hold up another one.
TEST_P(Refit, DisjointEnginesRunInParallel) {
  Fleet fleet;
  fleet.fill(1);
  Trainer stuck_trainer = make_trainer(fleet.source_dit, "stuck");
  Trainer trainer = make_trainer(fleet.source_dit, "free");
  Engine a = make_engine("a", fleet.dit_a);
  Engine b = make_engine("b", fleet.dit_b);
  quiet(a);
  BackgroundRefit stuck(stuck_trainer, {{"a", "transformer"}}, soon());
  ASSERT_TRUE(asked(a));
  {
    const WaitingEngine waiting(b);
    const auto report = trainer.refit({"b", "transformer"}, soon());
    ASSERT_TRUE(report) << report.error().to_string();
  }
  EXPECT_TRUE(fleet.dit_b.equals(fleet.source_dit));
  EXPECT_FALSE(fleet.dit_a.equals(fleet.source_dit)) << "the stuck refit was not stuck";
  must(a.poll(soon()));
  EXPECT_TRUE(stuck.outcome()) << text_of(stuck.outcome());
  EXPECT_TRUE(fleet.dit_a.equals(fleet.source_dit));
}

// Goal: two trainers that refit one engine at once take turns; the engine never holds a mix of
// both.
TEST_P(Refit, TwoTrainersOnOneEngineTakeTurns) {
  constexpr int kRefitsEach = rounds(20);
  Model first("transformer", large_tensors());
  Model second("transformer", large_tensors());
  Model target("transformer", large_tensors());
  first.fill(1);
  second.fill(2);
  Trainer one = make_trainer(first, "one");
  Trainer two = make_trainer(second, "two");
  Engine engine = make_engine("flux", target);
  std::atomic<int> mixes{0};
  must(engine.serve({[](Deadline) { return true; },
                     [&](const GateEvent*) {
                       // Between two gates the bytes stand still, so whoever came last must be
                       // there as a whole.
                       if (!target.equals(first) && !target.equals(second)) ++mixes;
                     }}));
  std::atomic<int> done{0};
  const auto refit_often = [&](Trainer& trainer) {
    for (int i = 0; i < kRefitsEach; ++i) {
      const auto report = trainer.refit({"flux", "transformer"}, soon());
      if (report) ++done;
    }
  };
  std::thread other([&] { refit_often(two); });
  refit_often(one);
  other.join();
  engine.stop_serving();
  EXPECT_EQ(done.load(), 2 * kRefitsEach);
  EXPECT_EQ(mixes.load(), 0);
  EXPECT_EQ(engine.version("transformer"), static_cast<std::uint64_t>(2 * kRefitsEach));
}

TEST_P(Refit, CommittedTransactionIsReplayedAndNotCopiedAgain) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Model committed("transformer", small_tensors());
  source.fill(1);
  committed.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  RefitOptions how;
  how.transaction = TransactionId::random();
  const auto first = trainer.refit({"flux", "transformer"}, soon(), how);
  ASSERT_TRUE(first) << first.error().to_string();
  EXPECT_FALSE(first->replayed);
  source.fill(2);
  const auto again = trainer.refit({"flux", "transformer"}, soon(), how);
  ASSERT_TRUE(again) << again.error().to_string();
  EXPECT_TRUE(again->replayed);
  EXPECT_EQ(again->version, first->version);
  EXPECT_TRUE(target.equals(committed)) << "the replay copied";
}

// Goal: a transaction is known again by what it wrote, not by its id alone.
TEST_P(Refit, CommittedIdWithOtherTensorsIsWrittenAndNotReplayed) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  target.fill(2);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  RefitOptions how;
  how.transaction = TransactionId::random();
  for (const std::size_t index : {0U, 1U}) {
    const auto report =
        trainer.refit({"flux", "transformer", "", {source.names()[index]}}, soon(), how);
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_FALSE(report->replayed);
    EXPECT_TRUE(target.tensor_equals(source, index)) << source.names()[index];
  }
}

// Goal: the same transaction sent twice before the first is done is written once. While it is
// written the newer request takes the older one's place; else the second finds it committed.
TEST_P(Refit, TransactionThatIsSentTwiceIsWrittenOnce) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer one = make_trainer(source, "one");
  Trainer two = make_trainer(source, "two");
  Engine engine = make_engine("flux", target);
  const TransactionId id = TransactionId::random();
  quiet(engine);
  BackgroundRefit first(one, {{"flux", "transformer"}}, soon(), id);
  ASSERT_TRUE(asked(engine));
  BackgroundRefit second(two, {{"flux", "transformer"}}, soon(), id);
  const WaitingEngine waiting(engine);
  // One that comes while the other is being written takes over its answer.
  if (code_of(first.outcome()) != Errc::busy) {
    ASSERT_TRUE(first.outcome()) << text_of(first.outcome());
    EXPECT_FALSE(first.outcome()->replayed);
  }
  ASSERT_TRUE(second.outcome()) << text_of(second.outcome());
  EXPECT_TRUE(second.outcome()->replayed);
  EXPECT_EQ(engine.version("transformer"), 1U);
}

TEST_P(Refit, StatusShowsVersionsSourceTransactionAndPhases) {
  Fleet fleet;
  Trainer trainer = make_trainer(fleet.source_dit);
  must(trainer.register_module(fleet.source_vae.spec(), soon()));
  Engine a = make_engine("a", fleet.dit_a);
  must(a.register_module(fleet.vae_a.spec(), soon()));
  Observer observer = make_observer();
  const auto module = [&](const std::string& name) {
    for (const ModuleStatus& one : must(observer.status(soon())).modules) {
      if (one.module == name) return one;
    }
    return ModuleStatus{};
  };
  EXPECT_EQ(module("transformer").state, ModuleState::initial);
  EXPECT_EQ(module("transformer").refits, 0U);
  EXPECT_TRUE(module("transformer").populated);
  EXPECT_TRUE(module("transformer").source.empty());

  RefitOptions how;
  const WaitingEngine waiting(a);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    how.transaction = TransactionId::random();
    must(trainer.refit({"a", "transformer"}, soon(), how));
  }
  const ModuleStatus dit = module("transformer");
  EXPECT_EQ(dit.engine, "a");
  EXPECT_EQ(dit.state, ModuleState::committed);
  EXPECT_EQ(dit.version, 3U);
  EXPECT_EQ(dit.refits, 3U);
  EXPECT_EQ(dit.source, "trainer/transformer");
  EXPECT_EQ(dit.transaction, how.transaction);
  EXPECT_EQ(dit.tensors, small_tensors().size());
  EXPECT_EQ(dit.last_bytes, dit.bytes);
  EXPECT_GT(dit.last.total_us, 0);
  EXPECT_GE(dit.last.total_us, dit.last.gate_us + dit.last.copy_us);
  EXPECT_EQ(module("vae").version, 0U);
  EXPECT_EQ(module("vae").state, ModuleState::initial);

  const DaemonStatus status = must(observer.status(soon()));
  EXPECT_EQ(status.refits, 3U);
  EXPECT_EQ(status.pid, static_cast<std::uint32_t>(daemon_.pid()));
  EXPECT_EQ(status.socket, socket_);
  EXPECT_FALSE(status.draining);
  std::map<std::string, std::uint32_t> sessions;
  for (const SessionStatus& one : status.sessions) sessions[one.name] = one.modules;
  EXPECT_EQ(sessions,
            (std::map<std::string, std::uint32_t>{{"a", 2}, {"observer", 0}, {"trainer", 2}}));
}

TEST_P(Refit, SessionsOfClientsThatLeftAreGone) {
  Observer observer = make_observer();
  {
    Model model("transformer", small_tensors());
    Engine engine = make_engine("flux", model);
    EXPECT_EQ(must(observer.status(soon())).sessions.size(), 2U);
  }
  EXPECT_TRUE(eventually([&] { return must(observer.status(soon())).sessions.size() == 1; }));
  // The name is free again.
  Model model("transformer", small_tensors());
  Engine engine = make_engine("flux", model);
  EXPECT_EQ(engine.version("transformer"), 0U);
}

TEST_P(Refit, EngineThatDiesAtItsGateFailsTheRefitAndTheNextEngineWorks) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  {
    Engine engine = make_engine("flux", target);
    quiet(engine);
    BackgroundRefit refit(trainer, {{"flux", "transformer"}}, soon());
    ASSERT_TRUE(asked(engine));
    { const Engine leaving = std::move(engine); }
    EXPECT_EQ(code_of(refit.outcome()), Errc::engine_gone) << text_of(refit.outcome());
  }
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(target.equals(source));
}

}  // namespace
}  // namespace refit::test
