// The proof in the background: which versions it proves, and which it does not.
//
// See refit_fixture.hpp for how the suite is built.

#include "conformance/refit_fixture.hpp"

namespace refit::test {
namespace {

/// Of the only module.
std::optional<std::uint64_t> proven_version(Observer& observer) {
  return must(observer.status(Deadline::in(std::chrono::seconds(20)))).modules.at(0).proven_version;
}

TEST_P(Refit, ProofReachesTheCommittedVersion) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  EXPECT_EQ(proven_version(observer), std::nullopt);
  for (int step = 0; step < 20; ++step) must(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 20; }));
  const DaemonMetrics metrics = must(observer.metrics(soon()));
  EXPECT_GE(metrics.proofs.equal, 1U);
  EXPECT_EQ(metrics.proofs.different, 0U);
  EXPECT_EQ(metrics.proofs.unreadable, 0U);
}

TEST_P(Refit, RefitOfSomeTensorsIsProvenOnTopOfAProvenVersionAlone) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  const auto proofs = [&] { return must(observer.metrics(soon())).proofs.equal; };
  must(trainer.refit({"flux", "transformer", "", {"scale"}}, soon()));
  must(trainer.refit({"flux", "transformer", "", {"counter"}}, soon()));
  ASSERT_TRUE(eventually([&] { return proofs() >= 1; }));
  EXPECT_EQ(proven_version(observer), std::nullopt) << "of the other tensors nothing is known";
  must(trainer.refit({"flux", "transformer"}, soon()));
  ASSERT_TRUE(eventually([&] { return proven_version(observer) == 3; }));
  must(trainer.refit({"flux", "transformer", "", {"scale"}}, soon()));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 4; }));
}

TEST_P(Refit, CheckSaysHowFarTheProofIs) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  ASSERT_TRUE(eventually([&] { return proven_version(observer) == 1; }));
  const DigestReport live = must(observer.digest({"flux", "transformer", DigestKind::raw}, soon()));
  const CheckRequest of_one{"flux", "transformer", DigestKind::raw, {live.tensors.front()}};
  const CheckReport report = must(observer.check(of_one, soon()));
  EXPECT_EQ(report.version, 1U);
  EXPECT_EQ(report.proven_version, 1U);
}

TEST_P(Refit, CastIsProvenByWhatItMakes) {
  if (GetParam() != MemoryKind::host) return;  // device memory is not cast
  Model source("transformer", {{"down", DType::float32, {3, 1111}}, {"up", DType::bfloat16, {77}}});
  Model target("transformer", {{"down", DType::bfloat16, {3, 1111}}, {"up", DType::float32, {77}}});
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 1; }));
}

/// The digests of what `model` holds.
std::vector<NamedDigest> digests_of(Observer& observer, const std::string& engine) {
  return must(observer.digest({engine, "transformer", DigestKind::raw},
                              Deadline::in(std::chrono::seconds(20))))
      .tensors;
}

TEST_P(Refit, DigestsThatCameWithTheRefitProveIt) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  RefitTarget wanted{"flux", "transformer"};
  wanted.expected = digests_of(observer, "flux");
  wanted.expected_kind = DigestKind::raw;
  must(trainer.refit(wanted, soon()));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 2; }));
  // Of a part: the rest is compared.
  wanted.expected.resize(1);
  must(trainer.refit(wanted, soon()));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 3; }));
  EXPECT_EQ(must(observer.metrics(soon())).proofs.refuted, 0U);
}

TEST_P(Refit, BytesThatTheDigestsRefutePoisonTheModule) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  RefitTarget wanted{"flux", "transformer"};
  wanted.expected = digests_of(observer, "flux");
  wanted.expected_kind = DigestKind::raw;
  wanted.expected[2].second.bytes[7] ^= 1;
  must(trainer.refit(wanted, soon()));
  EXPECT_TRUE(eventually([&] { return engine.state("transformer") == ModuleState::poisoned; }));
  EXPECT_FALSE(engine.step_allowed());
  EXPECT_EQ(must(observer.metrics(soon())).proofs.refuted, 1U);
  // Another refit of all of it makes it whole.
  must(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return engine.step_allowed(); }));
  EXPECT_TRUE(eventually([&] { return proven_version(observer) == 3; }));
}

TEST_P(Refit, ExpectedDigestsThatMakeNoSenseAreRefused) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  const std::vector<NamedDigest> live = digests_of(observer, "flux");
  const auto refused = [&](const RefitTarget& wanted) {
    const auto report = trainer.refit(wanted, soon());
    return report ? Errc::ok : report.error().code;
  };
  RefitTarget wanted{"flux", "transformer", "", {"scale"}};
  wanted.expected = {{"counter", live.front().second}, {"nobody", live.front().second}};
  const auto report = trainer.refit(wanted, soon());
  ASSERT_FALSE(report);
  EXPECT_EQ(report.error().code, Errc::manifest_mismatch);
  EXPECT_EQ(report.error().details.size(), 2U);
  wanted.expected = {{"scale", live.front().second}, {"scale", live.front().second}};
  EXPECT_EQ(refused(wanted), Errc::bad_argument);
  wanted.expected.pop_back();
  wanted.expected_kind = DigestKind::xxh3;
  EXPECT_EQ(refused(wanted), Errc::bad_argument);
  wanted.expected_kind = DigestKind::raw;
  wanted.expected.front().second.length = 16;
  EXPECT_EQ(refused(wanted), Errc::bad_argument);
  EXPECT_EQ(engine.version("transformer"), 0U);
}

class SkippedTensor : public Refit {
 protected:
  SkippedTensor() : Refit({true, "copy.skip_tensor=skip", {}, {}}) {}
};

TEST_P(SkippedTensor, TensorThatWasLeftOutIsNotProven) {
  if (GetParam() != MemoryKind::host) return;  // the point is in copies on the host
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return must(observer.metrics(soon())).proofs.different == 1; }));
  EXPECT_EQ(proven_version(observer), std::nullopt);
}

class Unproven : public Refit {
 protected:
  Unproven() : Refit({false, {}, {"--proof-threads", "0"}, {}}) {}
};

TEST_P(Unproven, NothingIsProvenWithoutThreads) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  Observer observer = make_observer();
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer"}, soon()));
  must(observer.digest({"flux", "transformer", DigestKind::raw}, soon()));
  const ProofCounts proofs = must(observer.metrics(soon())).proofs;
  EXPECT_EQ(proofs.equal + proofs.different + proofs.overtaken + proofs.unreadable, 0U);
  EXPECT_EQ(proven_version(observer), std::nullopt);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Memory, SkippedTensor, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, Unproven, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });

}  // namespace refit::test
