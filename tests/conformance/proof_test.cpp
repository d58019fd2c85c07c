// The proof in the background: which versions it proves, and which it does not.
//
// See refit_fixture.hpp for how the suite is built.

#include "conformance/refit_fixture.hpp"
#include "support/effort.hpp"
#include "support/offloaded_model.hpp"

namespace refit::test {
namespace {

/// A trainer, an engine that waits in its gate, and somebody who looks.
class Proof : public Refit {
 protected:
  explicit Proof(const DaemonOptions& how = {}) : Refit(how) {}
  void SetUp() override { start(small_tensors(), small_tensors()); }
  void start(const std::vector<TensorShape>& source, const std::vector<TensorShape>& target) {
    source_.emplace("transformer", source);
    target_.emplace("transformer", target);
    source_->fill(1);
    trainer_.emplace(make_trainer(*source_));
    engine_.emplace(make_engine("flux", *target_));
    observer_.emplace(make_observer());
    waiting_.emplace(*engine_);
  }

  [[nodiscard]] std::optional<std::uint64_t> proven_version() {
    return must(observer_->status(soon())).modules.at(0).proven_version;
  }
  /// So far, or after a while.
  [[nodiscard]] bool reaches(std::uint64_t version) {
    return eventually([&] { return proven_version() == version; });
  }
  [[nodiscard]] ProofCounts proofs() { return must(observer_->metrics(soon())).proofs; }
  /// The digests of what the engine holds.
  [[nodiscard]] std::vector<NamedDigest> live_digests() {
    return must(observer_->digest({"flux", "transformer", DigestKind::raw}, soon())).tensors;
  }

  std::optional<Model> source_, target_;
  std::optional<Trainer> trainer_;
  std::optional<Engine> engine_;
  std::optional<Observer> observer_;
  std::optional<WaitingEngine> waiting_;
};

TEST_P(Proof, ProofReachesTheCommittedVersion) {
  EXPECT_EQ(proven_version(), std::nullopt);
  for (int step = 0; step < 20; ++step) must(trainer_->refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(reaches(20));
  EXPECT_GE(proofs().equal, 1U);
  EXPECT_EQ(proofs().different, 0U);
  EXPECT_EQ(proofs().unreadable, 0U);
}

TEST_P(Proof, RefitOfSomeTensorsIsProvenOnTopOfAProvenVersionAlone) {
  for (const auto& [tensor, proven] : {std::pair{"scale", 1U}, std::pair{"counter", 2U}}) {
    must(trainer_->refit({"flux", "transformer", "", {tensor}}, soon()));
    ASSERT_TRUE(eventually([&, count = proven] { return proofs().equal >= count; }));
    EXPECT_EQ(proven_version(), std::nullopt) << "of the other tensors nothing is known";
  }
  must(trainer_->refit({"flux", "transformer"}, soon()));
  ASSERT_TRUE(reaches(3));
  must(trainer_->refit({"flux", "transformer", "", {"scale"}}, soon()));
  EXPECT_TRUE(reaches(4));
}

TEST_P(Proof, CheckSaysHowFarTheProofIs) {
  must(trainer_->refit({"flux", "transformer"}, soon()));
  ASSERT_TRUE(reaches(1));
  const CheckRequest of_one{"flux", "transformer", DigestKind::raw, {live_digests().front()}};
  const CheckReport report = must(observer_->check(of_one, soon()));
  EXPECT_EQ(report.version, 1U);
  EXPECT_EQ(report.proven_version, 1U);
}

class ProofOfACast : public Proof {
 protected:
  void SetUp() override {
    start({{"down", DType::float32, {3, 1111}}, {"up", DType::bfloat16, {77}}},
          {{"down", DType::bfloat16, {3, 1111}}, {"up", DType::float32, {77}}});
  }
};

TEST_P(ProofOfACast, IsOfWhatTheCastMakes) {
  if (!can_cast(GetParam())) return;
  must(trainer_->refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(reaches(1));
}

TEST_P(Proof, DigestsThatCameWithTheRefitProveIt) {
  must(trainer_->refit({"flux", "transformer"}, soon()));
  RefitTarget wanted{"flux", "transformer"};
  wanted.expected = live_digests();
  wanted.expected_kind = DigestKind::raw;
  must(trainer_->refit(wanted, soon()));
  EXPECT_TRUE(reaches(2));
  // Of a part: the rest is compared.
  wanted.expected.resize(1);
  must(trainer_->refit(wanted, soon()));
  EXPECT_TRUE(reaches(3));
  EXPECT_EQ(proofs().refuted, 0U);
}

TEST_P(Proof, BytesThatTheDigestsRefutePoisonTheModule) {
  must(trainer_->refit({"flux", "transformer"}, soon()));
  RefitTarget wanted{"flux", "transformer"};
  wanted.expected = live_digests();
  wanted.expected_kind = DigestKind::raw;
  wanted.expected[2].second.bytes[7] ^= 1;
  must(trainer_->refit(wanted, soon()));
  EXPECT_TRUE(eventually([&] { return engine_->state("transformer") == ModuleState::poisoned; }));
  EXPECT_FALSE(engine_->step_allowed());
  EXPECT_EQ(proofs().refuted, 1U);
  // Another refit of all of it makes it whole.
  must(trainer_->refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return engine_->step_allowed(); }));
  EXPECT_TRUE(reaches(3));
}

TEST_P(Proof, ExpectedDigestsThatMakeNoSenseAreRefused) {
  const std::vector<NamedDigest> live = live_digests();
  const auto refused = [&](const RefitTarget& wanted) {
    const auto report = trainer_->refit(wanted, soon());
    return report ? Errc::ok : report.error().code;
  };
  RefitTarget wanted{"flux", "transformer", "", {"scale"}};
  wanted.expected = {{"counter", live.front().second}, {"nobody", live.front().second}};
  const auto report = trainer_->refit(wanted, soon());
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
  EXPECT_EQ(engine_->version("transformer"), 0U);
}

class SkippedTensor : public Proof {
 protected:
  SkippedTensor() : Proof({true, "copy.skip_tensor=skip", {}, {}}) {}
};

TEST_P(SkippedTensor, TensorThatWasLeftOutIsNotProven) {
  if (GetParam() != MemoryKind::host) return;  // the point is in copies on the host
  must(trainer_->refit({"flux", "transformer"}, soon()));
  EXPECT_TRUE(eventually([&] { return proofs().different == 1; }));
  EXPECT_EQ(proven_version(), std::nullopt);
}

/// An engine that offloads: every layer has a second place while it is on the device.
class ProofOfLayers : public Proof {
 protected:
  static constexpr std::size_t kLayers = 6;
  explicit ProofOfLayers(const DaemonOptions& how = {}) : Proof(how) {}
  void SetUp() override {
    source_.emplace("transformer", layered_tensors(kLayers));
    source_->fill(1);
    trainer_.emplace(make_trainer(*source_));
    engine_.emplace(must(Engine::connect("flux", options(), soon())));
    must(engine_->register_module(offloaded_.spec(), soon()));
    observer_.emplace(make_observer());
    waiting_.emplace(*engine_);
  }
  /// SHA-256 of what host places hold, of all tensors but those that `skip` begins the name of.
  [[nodiscard]] RefitTarget with_digests(const std::string& skip = "none") {
    RefitTarget wanted{"flux", "transformer"};
    wanted.expected_kind = DigestKind::raw;
    for (NamedDigest& one : live_digests()) {
      if (one.first.rfind(skip, 0) != 0) wanted.expected.push_back(std::move(one));
    }
    return wanted;
  }
  void refit(const RefitTarget& wanted = {"flux", "transformer"}) {
    must(trainer_->refit(wanted, soon()));
  }

  OffloadedModel offloaded_{"transformer", kLayers, 4, 1,
                            [](const auto& bytes) { return make_storage(GetParam(), bytes); }};
};

// Goal: a version is proven with the layers that are there, wherever they go. Method: a thread
// moves them all the time; every version is proven, by comparison and by digests in turn, and
// nothing is ever held against one.
TEST_P(ProofOfLayers, LayersThatMoveAreProvenOrAbsent) {
  const Prefetcher prefetcher(offloaded_);
  for (std::uint64_t round = 1; round <= rounds(30); ++round) {
    source_->fill(round);
    refit();
    ASSERT_TRUE(reaches(2 * round - 1));
    refit(with_digests("layers.3."));
    ASSERT_TRUE(reaches(2 * round));
  }
  EXPECT_EQ(proofs().different, 0U);
  EXPECT_EQ(proofs().refuted, 0U);
  EXPECT_EQ(proofs().unreadable, 0U);
}

class SkippedLayers : public ProofOfLayers {
 protected:
  SkippedLayers() : ProofOfLayers({true, "copy.skip_layers=skip", {}, {}}) {}
};

TEST_P(SkippedLayers, LayerThatWasLeftOutIsNotProvenUntilItIsAbsent) {
  offloaded_.fetch(1);
  refit();
  EXPECT_TRUE(eventually([&] { return proofs().different == 1; }));
  EXPECT_EQ(proven_version(), std::nullopt);
  EXPECT_EQ(engine_->state("transformer"), ModuleState::committed);
  CheckRequest request{"flux", "transformer", DigestKind::raw, live_digests(), Place::host};
  EXPECT_TRUE(must(observer_->check(request, soon())).ok());
  EXPECT_EQ(proven_version(), std::nullopt) << "by a check of the other place";
  request.place = Place::all;
  EXPECT_FALSE(must(observer_->check(request, soon())).device_mismatched.empty());
  EXPECT_EQ(proven_version(), std::nullopt);
  offloaded_.drop(1);
  refit();
  EXPECT_TRUE(reaches(2));
  // Copied from the host since: it holds what the refit should have written.
  offloaded_.fetch(1);
  refit();
  EXPECT_TRUE(reaches(3));
}

// Goal: what came with the refit decides of device places too. Method: digests of all tensors, so
// that nothing is compared; and of all but the layer that was left out, which is then compared.
TEST_P(SkippedLayers, DigestsRefuteALayerThatWasLeftOutAndOnlyWhileItIsThere) {
  refit();
  ASSERT_TRUE(reaches(1));
  offloaded_.fetch(2);
  source_->fill(2);
  refit();
  ASSERT_TRUE(eventually([&] { return proofs().different == 1; }));
  refit(with_digests("layers.2."));
  ASSERT_TRUE(eventually([&] { return proofs().different == 2; }));
  EXPECT_EQ(proofs().refuted, 0U);

  refit(with_digests());
  EXPECT_TRUE(eventually([&] { return engine_->state("transformer") == ModuleState::poisoned; }));
  EXPECT_FALSE(engine_->step_allowed());
  EXPECT_EQ(proofs().refuted, 1U);
  offloaded_.drop(2);
  refit(with_digests());
  EXPECT_TRUE(reaches(5));
  EXPECT_TRUE(engine_->step_allowed());
  EXPECT_EQ(proofs().refuted, 1U);
}

class Unproven : public Proof {
 protected:
  Unproven() : Proof({false, {}, {"--proof-threads", "0"}, {}}) {}
};

TEST_P(Unproven, NothingIsProvenWithoutThreads) {
  must(trainer_->refit({"flux", "transformer"}, soon()));
  must(observer_->digest({"flux", "transformer", DigestKind::raw}, soon()));
  const ProofCounts found = proofs();
  EXPECT_EQ(found.equal + found.different + found.overtaken + found.unreadable, 0U);
  EXPECT_EQ(proven_version(), std::nullopt);
}

}  // namespace

INSTANTIATE_TEST_SUITE_P(Memory, Proof, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, ProofOfACast, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, SkippedTensor, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, ProofOfLayers, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, SkippedLayers, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });
INSTANTIATE_TEST_SUITE_P(Memory, Unproven, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& kind) { return name_of(kind.param); });

}  // namespace refit::test
