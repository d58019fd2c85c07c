// What one refit of one module does: bytes, versions, events, and the ways an engine is asked.
//
// See refit_fixture.hpp for how the suite is built.

#include "conformance/refit_fixture.hpp"
#include "support/cast_by_definition.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

TEST_P(Refit, CopiesEveryTensorAndCountsVersions) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  for (std::uint64_t step = 1; step <= 20; ++step) {
    source.fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, step);
    EXPECT_EQ(report->tensors, source.names().size());
    EXPECT_TRUE(target.equals(source));
  }
}

TEST_P(Refit, ReportsBytesTensorsGuaranteeAndTransaction) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  std::uint64_t bytes = 0;
  for (const TensorShape& tensor : small_tensors()) bytes += Model::bytes_of(tensor);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  RefitOptions with_id;
  with_id.transaction = TransactionId{7, 9};
  const auto report = trainer.refit(kWhole, soon(), with_id);
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->bytes, bytes);
  EXPECT_EQ(report->tensors, small_tensors().size());
  EXPECT_EQ(report->guarantee, GetParam() == MemoryKind::cuda_legacy
                                   ? Guarantee::poisoned_on_failure
                                   : Guarantee::atomic);
  EXPECT_EQ(report->transaction, with_id.transaction);
  EXPECT_FALSE(report->replayed);
}

// Goal: copies that the pool's threads share out, and sizes that no vector width divides, are
// exact.
TEST_P(Refit, CopiesLargeTensorsOfOddSizes) {
  const std::vector<TensorShape> tensors{{"large", DType::uint8, {5'000'011}},
                                         {"odd", DType::uint8, {3, 7, 333'337}},
                                         {"tiny", DType::uint8, {1}}};
  Model source("transformer", tensors);
  Model target("transformer", tensors);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    source.fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_TRUE(target.equals(source));
  }
}

// Goal: a tensor stored transposed on one side is the same tensor on the other.
// Method: the source is column-major, the target row-major; elements are compared by index.
TEST_P(Refit, FollowsStridesOnEitherSide) {
  constexpr std::uint64_t kRows = 5;
  constexpr std::uint64_t kColumns = 7;
  Model source("transformer", {{"weight", DType::float32, {kRows, kColumns}}});
  Model target("transformer", {{"weight", DType::float32, {kRows, kColumns}}});
  source.fill(1);
  ModuleSpec transposed("transformer");
  must(transposed.add("weight", DType::float32, {kRows, kColumns}, source.memory_of(0),
                      source.address(0), {1, kRows}));
  transposed.set_fence(source.spec().fence());
  Trainer trainer = connect_trainer();
  must(trainer.register_module(transposed, soon()));
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  for (std::uint64_t row = 0; row < kRows; ++row) {
    for (std::uint64_t column = 0; column < kColumns; ++column) {
      EXPECT_EQ(std::memcmp(target.data(0) + 4 * (row * kColumns + column),
                            source.data(0) + 4 * (column * kRows + row), 4),
                0)
          << row << ", " << column;
    }
  }
}

/// One tensor for each cast, with an odd number of elements and neighbours that need none.
std::vector<TensorShape> cast_tensors(bool of_the_source) {
  std::vector<TensorShape> tensors{{"same", DType::float32, {33}}};
#define REFIT_X(from, to)                                                                    \
  tensors.push_back({#from "_to_" #to, of_the_source ? DType::from : DType::to, {5, 3001}}); \
  tensors.push_back({#from "_to_" #to ".beside", DType::uint8, {3}});
  REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  return tensors;
}

// Goal: a target of another dtype gets its own dtype's values, the digest is of those, and bytes
// beside it are whole. Method: random bits, NaN among them, against casts element by element.
// Device memory is refused by a build without kernels.
TEST_P(Refit, CastsToTheDtypeOfTheTarget) {
  Model source("transformer", cast_tensors(true));
  Model target("transformer", cast_tensors(false));
  Model expected("transformer", cast_tensors(false));
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Engine other = make_engine("other", expected);
  const WaitingEngine waiting(engine);
  for (std::uint64_t step = 1; step <= 2; ++step) {
    source.fill(step);
    const auto report = trainer.refit(kWhole, soon());
    if (!can_cast(GetParam())) {
      EXPECT_EQ(code_of(report), Errc::unsupported) << text_of(report);
      EXPECT_TRUE(
          one_detail_has(report, {"float32_to_bfloat16", "flux/transformer", "torch.bfloat16",
                                  "torch.float32", "trainer/transformer"}))
          << text_of(report);
      EXPECT_EQ(waiting.events(), 0);
      continue;
    }
    ASSERT_TRUE(report) << report.error().to_string();
    std::uint64_t bytes = 0;
    for (std::size_t i = 0; i < expected.names().size(); ++i) {
      const Cast cast = *cast_between(cast_tensors(true)[i].dtype, cast_tensors(false)[i].dtype);
      cast_by_definition(cast, expected.data(i), source.data(i), expected.bytes(i));
      bytes += expected.bytes(i);
    }
    expected.upload();
    expected.settle();
    EXPECT_TRUE(target.equals(expected)) << step;
    EXPECT_EQ(digests("flux", "transformer"), digests("other", "transformer"));
    EXPECT_EQ(report->bytes, bytes);
    EXPECT_EQ(report->tensors, expected.names().size());
  }
}

TEST_P(Refit, SharesOneThreadBetweenTrainerAndEngine) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  engine.bind_to_this_thread();
  source.fill(1);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(target.equals(source));
  const auto event = engine.poll(soon());
  ASSERT_TRUE(event);
  ASSERT_TRUE(*event);
  ASSERT_EQ((*event)->modules.size(), 1U);
  EXPECT_EQ((*event)->modules[0].version, 1U);
}

// Goal: nothing is written before the engine holds still.
// Method: the engine is asked (its fd says so) but does not answer until its bytes were compared.
TEST_P(Refit, WritesNothingBeforeTheEngineHoldsStill) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Model before("transformer", small_tensors());
  source.fill(1);
  target.fill(2);
  before.fill(2);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  quiet(engine);
  BackgroundRefit refit(trainer, {kWhole}, soon());
  ASSERT_TRUE(asked(engine));
  EXPECT_TRUE(target.equals(before));
  EXPECT_TRUE(engine.step_allowed());
  const auto event = engine.poll(soon());
  ASSERT_TRUE(event) << event.error().to_string();
  ASSERT_TRUE(*event);
  EXPECT_TRUE(target.equals(source));
  EXPECT_TRUE(refit.outcome()) << text_of(refit.outcome());
}

TEST_P(Refit, TellsTheEngineModuleVersionAndTransaction) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  for (const bool reset_caches : {true, false}) {
    const TransactionId id = TransactionId::random();
    RefitOptions how;
    how.transaction = id;
    how.reset_caches = reset_caches;
    engine.bind_to_this_thread();
    const auto report = trainer.refit(kWhole, soon(), how);
    ASSERT_TRUE(report) << report.error().to_string();
    const auto event = engine.poll(soon());
    ASSERT_TRUE(event);
    ASSERT_TRUE(*event);
    EXPECT_EQ((*event)->reset_caches, reset_caches);
    ASSERT_EQ((*event)->modules.size(), 1U);
    EXPECT_EQ((*event)->modules[0].name, "transformer");
    EXPECT_EQ((*event)->modules[0].version, report->version);
    EXPECT_EQ((*event)->modules[0].transaction, id);
    EXPECT_EQ(engine.state("transformer"), ModuleState::committed);
    EXPECT_TRUE(engine.step_allowed());
  }
}

TEST_P(Refit, EngineThatIsNotReadyInTimeIsNamedAndUnchanged) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Model before("transformer", small_tensors());
  source.fill(1);
  target.fill(2);
  before.fill(2);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const auto refused = trainer.refit(kWhole, Deadline::in(300ms));
  EXPECT_EQ(code_of(refused), Errc::engine_not_ready) << text_of(refused);
  EXPECT_NE(text_of(refused).find("flux"), std::string::npos) << text_of(refused);
  EXPECT_TRUE(target.equals(before));
  EXPECT_TRUE(engine.step_allowed());
  EXPECT_EQ(engine.version("transformer"), 0U);

  // The question that timed out must not confuse the next one.
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 1U);
  EXPECT_TRUE(target.equals(source));
}

TEST_P(Refit, IdleEngineIsWokenThroughItsFd) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  for (std::uint64_t step = 1; step <= 3; ++step) {
    source.fill(step);
    BackgroundRefit refit(trainer, {kWhole}, soon());
    bool committed = false;
    while (!committed) {
      ASSERT_TRUE(asked(engine));
      const auto event = engine.poll(soon());
      ASSERT_TRUE(event) << event.error().to_string();
      committed = event->has_value();
    }
    ASSERT_TRUE(refit.outcome()) << text_of(refit.outcome());
    EXPECT_TRUE(target.equals(source));
  }
}

TEST_P(Refit, EngineServesItsGateOnItsOwnThread) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  std::atomic<int> held{0};
  std::atomic<std::uint64_t> seen{0};
  must(engine.serve({[&](Deadline) { return ++held > 0; },
                     [&](const GateEvent* event) {
                       if (event != nullptr) seen.store(event->modules.at(0).version);
                     }}));
  for (std::uint64_t step = 1; step <= 3; ++step) {
    source.fill(step);
    const auto report = trainer.refit(kWhole, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_TRUE(target.equals(source));
    EXPECT_TRUE(eventually([&] { return seen.load() == step; }));
  }
  engine.stop_serving();
  EXPECT_EQ(held.load(), 3);
}

TEST_P(Refit, ModuleThatIsRegisteredAgainKeepsItsVersionAndGetsTheBytes) {
  Model source("transformer", small_tensors());
  Model first("transformer", small_tensors());
  Model second("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", first);
  engine.bind_to_this_thread();
  source.fill(1);
  must(trainer.refit(kWhole, soon()));
  must(engine.poll(soon()));
  must(engine.register_module(second.spec(), soon()));
  EXPECT_EQ(engine.version("transformer"), 1U);
  source.fill(2);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->version, 2U);
  EXPECT_TRUE(second.equals(source));
  EXPECT_FALSE(first.equals(source)) << "the old memory was written";
}

TEST_P(Refit, SourceThatIsRegisteredAgainIsReadFromItsNewMemory) {
  Model first("transformer", small_tensors());
  Model second("transformer", small_tensors());
  Model target("transformer", small_tensors());
  first.fill(1);
  second.fill(2);
  Trainer trainer = make_trainer(first);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  must(trainer.refit(kWhole, soon()));
  EXPECT_TRUE(target.equals(first));
  must(trainer.register_module(second.spec(), soon()));
  must(trainer.refit(kWhole, soon()));
  EXPECT_TRUE(target.equals(second));
}

TEST_P(Refit, UnregisteredModuleIsNoTargetAndNoSource) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  must(engine.unregister_module("transformer", soon()));
  const auto no_target = trainer.refit(kWhole, soon());
  EXPECT_EQ(code_of(no_target), Errc::no_such_module) << text_of(no_target);
  EXPECT_NE(text_of(no_target).find("flux"), std::string::npos) << text_of(no_target);
  must(engine.register_module(target.spec(), soon()));
  must(trainer.unregister_module("transformer", soon()));
  const auto no_source = trainer.refit(kWhole, soon());
  EXPECT_EQ(code_of(no_source), Errc::no_such_module) << text_of(no_source);
  EXPECT_NE(text_of(no_source).find("trainer"), std::string::npos) << text_of(no_source);
  must(trainer.register_module(source.spec(), soon()));
  source.fill(3);
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit(kWhole, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(target.equals(source));
}

INSTANTIATE_TEST_SUITE_P(Memory, Refit, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
