// Layers with a second place on a device: a refit writes the host's and the device's, a digest
// reads either, and nothing else is touched.
//
// Of the host kind the device is another buffer of host memory; of the others the trainer's tensors
// and the pool are on one, and the engine's first places in host memory, as offload has them.
// Expected digests are SHA-256 by OpenSSL over the trainer's bytes; nothing of the project's digest
// code is used to make them.

#include <openssl/evp.h>

#include <map>

#include "conformance/refit_fixture.hpp"
#include "support/cast_by_definition.hpp"
#include "support/effort.hpp"
#include "support/offloaded_model.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

constexpr std::size_t kLayers = 6;

Digest sha256(const std::byte* data, std::size_t bytes) {
  Digest digest;
  unsigned int length = 32;
  EVP_Digest(data, bytes, digest.bytes.data(), &length, EVP_sha256(), nullptr);
  digest.length = 32;
  return digest;
}

std::map<std::string, Digest> digests_of(const Model& model) {
  std::map<std::string, Digest> all;
  for (std::size_t i = 0; i < model.names().size(); ++i)
    all[model.names()[i]] = sha256(model.data(i), model.bytes(i));
  return all;
}

/// Names whose digest is not the expected one.
std::vector<std::string> wrong(const std::vector<NamedDigest>& got,
                               const std::map<std::string, Digest>& expected) {
  std::vector<std::string> names;
  for (const auto& [name, digest] : got) {
    if (expected.at(name) != digest) names.push_back(name);
  }
  return names;
}

class Offload : public Refit {
 protected:
  static OffloadedModel make_offloaded_model(std::uint64_t width = 1) {
    return OffloadedModel("transformer", kLayers, 4, width,
                          [](const auto& bytes) { return make_storage(GetParam(), bytes); });
  }
  Engine make_offloaded(OffloadedModel& model) {
    Engine engine = must(Engine::connect("flux", options(), soon()));
    must(engine.register_module(model.spec(), soon()));
    engine.bind_to_this_thread();
    return engine;
  }
  static DigestReport digest(Observer& observer, Place place) {
    DigestRequest request{"flux", "transformer", DigestKind::raw};
    request.place = place;
    return must(observer.digest(request, soon()));
  }
  void SetUp() override { source_.fill(1); }

  Model source_{"transformer", layered_tensors(kLayers)};
  OffloadedModel target_ = make_offloaded_model();
};

TEST_P(Offload, RefitWritesHostAndDeviceAndNothingElse) {
  Trainer trainer = make_trainer(source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(1);
  target_.fetch(4);
  const RefitReport report = must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  EXPECT_TRUE(target_.holds_exactly(source_));
  std::uint64_t layer_bytes = 0;
  std::uint64_t all_bytes = 0;
  for (std::size_t i = 0; i < source_.names().size(); ++i) {
    all_bytes += source_.bytes(i);
    const bool resident = source_.names()[i].rfind("layers.1.", 0) == 0 ||
                          source_.names()[i].rfind("layers.4.", 0) == 0;
    layer_bytes += resident ? source_.bytes(i) : 0;
  }
  EXPECT_EQ(report.bytes, all_bytes);
  EXPECT_EQ(report.device_bytes, layer_bytes);

  Observer observer = make_observer();
  const auto expected = digests_of(source_);
  const DigestReport host = digest(observer, Place::host);
  EXPECT_EQ(host.tensors.size(), expected.size());
  EXPECT_EQ(wrong(host.tensors, expected), std::vector<std::string>{});
  EXPECT_TRUE(host.device.empty() && host.absent.empty());
  const DigestReport device = digest(observer, Place::device);
  EXPECT_TRUE(device.tensors.empty());
  EXPECT_EQ(device.device.size(), 10U);
  EXPECT_EQ(wrong(device.device, expected), std::vector<std::string>{});
  EXPECT_EQ(device.absent.size(), expected.size() - 10);
  const DigestReport all = digest(observer, Place::all);
  EXPECT_EQ(all.tensors, host.tensors);
  EXPECT_EQ(all.device, device.device);
  EXPECT_EQ(all.absent, device.absent);
}

// Goal: a cast reaches both places of a layer. Method: a trainer that has float32 alone, and what
// its elements become. Device memory is refused by a build without kernels.
TEST_P(Offload, CastsIntoBothPlaces) {
  std::vector<TensorShape> tensors = layered_tensors(kLayers);
  Model expected("transformer", tensors);
  for (TensorShape& tensor : tensors) tensor.dtype = DType::float32;
  Model source("transformer", tensors);
  source.fill(2);
  Trainer trainer = make_trainer(source);
  Engine sut = make_offloaded(target_);
  target_.fetch(1);
  target_.fetch(4);
  const auto report = trainer.refit(kWhole, soon());
  if (!can_cast(GetParam())) {
    EXPECT_EQ(code_of(report), Errc::unsupported) << text_of(report);
    EXPECT_TRUE(one_detail_has(report, {"layers.1.h", "torch.bfloat16", "torch.float32"}))
        << text_of(report);
    return;
  }
  must(report);
  must(sut.poll(soon()));
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const Cast cast = *cast_between(DType::float32, layered_tensors(kLayers)[i].dtype);
    cast_by_definition(cast, expected.data(i), source.data(i), expected.bytes(i));
  }
  EXPECT_TRUE(target_.holds_exactly(expected));
}

// Goal: a selection writes both places of what it names and leaves the rest of a layer alone.
TEST_P(Offload, SelectionWritesBothPlacesOfItsTensorsOnly) {
  Trainer trainer = make_trainer(source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(2);
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  test::Model mixed("transformer", layered_tensors(kLayers));
  mixed.fill(1);
  source_.fill(7);
  RefitTarget part = kWhole;
  for (std::size_t i = 0; i < mixed.names().size(); ++i) {
    const std::string& name = mixed.names()[i];
    if (name != "layers.2.b" && name != "layers.3.h") continue;
    part.selection.push_back(name);
    std::memcpy(mixed.data(i), source_.data(i), source_.bytes(i));
  }
  must(trainer.refit(part, soon()));
  must(sut.poll(soon()));
  EXPECT_TRUE(target_.holds_exactly(mixed));
}

// Goal: what checks say of each place. Method: a device place that is spoilt behind everybody's
// back is found there and only there; what is not resident is absent, not wrong.
TEST_P(Offload, CheckSaysWhichPlaceIsWrong) {
  Trainer trainer = make_trainer(source_);
  Engine sut = make_offloaded(target_);
  target_.fetch(0);
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  Observer observer = make_observer();
  CheckRequest request{"flux", "transformer", DigestKind::raw};
  for (const auto& [name, digest] : digests_of(source_))
    request.expected.emplace_back(name, digest);
  const auto check = [&](Place place) {
    request.place = place;
    return must(observer.check(request, soon()));
  };
  const auto count = static_cast<std::uint32_t>(request.expected.size());
  CheckReport report = check(Place::all);
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.verified, count);
  EXPECT_EQ(report.absent.size(), count - 5U);
  report = check(Place::device);
  EXPECT_TRUE(report.ok());
  EXPECT_EQ(report.verified, 5U);
  EXPECT_EQ(report.absent.size(), count - 5U);

  // The first byte of the pool is layer 0's first: tensor layers.0.a.
  target_.spoil_pool(0);
  EXPECT_TRUE(check(Place::host).ok());
  report = check(Place::device);
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(report.verified, 4U);
  EXPECT_TRUE(report.mismatched.empty());
  EXPECT_EQ(report.device_mismatched, std::vector<std::string>{"layers.0.a"});
  report = check(Place::all);
  EXPECT_FALSE(report.ok());
  EXPECT_EQ(report.verified, count - 1);
  EXPECT_EQ(report.device_mismatched, std::vector<std::string>{"layers.0.a"});

  request.expected = {{"embed", request.expected.front().second},
                      {"nowhere", request.expected.front().second}};
  report = check(Place::device);
  EXPECT_EQ(report.missing, std::vector<std::string>{"nowhere"});
  EXPECT_EQ(report.absent, std::vector<std::string>{"embed"});
}

// Goal: the sentence of the whole feature. Method: a thread moves layers in and out of the device
// all the time; after each of 1,000 refits of other bytes every digest of either place is the
// trainer's, and every byte of host and pool is what it must be, padding and empty places included.
TEST_P(Offload, ThousandRefitsUnderPrefetchLeaveBothPlacesRight) {
  Trainer trainer = make_trainer(source_);
  Engine sut = make_offloaded(target_);
  Observer observer = make_observer();
  must(trainer.refit(kWhole, soon()));
  must(sut.poll(soon()));
  std::map<std::string, int> seen_on_device;
  std::size_t device_bytes = 0;
  {
    const Prefetcher prefetcher(target_);
    for (std::uint64_t round = 1; round <= rounds(1'000); ++round) {
      source_.fill(100 + round);
      // On a busy machine a thread may not get on for many rounds.
      const int moves = prefetcher.moves();
      while (prefetcher.moves() < moves + 3) std::this_thread::sleep_for(50us);
      const RefitReport report = must(trainer.refit(kWhole, soon()));
      device_bytes += report.device_bytes;
      must(sut.poll(soon()));
      const auto expected = digests_of(source_);
      const DigestReport all = digest(observer, Place::all);
      ASSERT_EQ(all.version, round + 1);
      ASSERT_EQ(all.tensors.size(), expected.size());
      ASSERT_EQ(wrong(all.tensors, expected), std::vector<std::string>{})
          << "host, round " << round;
      ASSERT_EQ(wrong(all.device, expected), std::vector<std::string>{})
          << "device, round " << round;
      for (const auto& [name, digest] : all.device) ++seen_on_device[name];
      const auto still = target_.still();
      ASSERT_TRUE(target_.holds_exactly(source_)) << "round " << round;
    }
  }
  EXPECT_GT(device_bytes, 0U);
  EXPECT_EQ(seen_on_device.size(), kLayers * 5) << "not every tensor was ever read on the device";
}

// Goal: layers that are too large for the loop to copy itself reach both places through the pool.
TEST_P(Offload, LargeLayersReachBothPlaces) {
  constexpr std::uint64_t kWidth = 20'000;
  Model source("transformer", layered_tensors(kLayers, kWidth));
  OffloadedModel target = make_offloaded_model(kWidth);
  Trainer trainer = make_trainer(source);
  Engine sut = make_offloaded(target);
  for (std::uint64_t round = 0; round < kLayers; ++round) {
    target.fetch(round);
    if (round >= 2) target.drop(round - 2);
    source.fill(100 + round);
    const RefitReport report = must(trainer.refit(kWhole, soon()));
    must(sut.poll(soon()));
    EXPECT_GT(report.device_bytes, kWidth * 44);
    ASSERT_TRUE(target.holds_exactly(source)) << "round " << round;
  }
}

// Goal: a refit that is called off, and one that is refused, let the prefetcher go on.
TEST_P(Offload, PrefetchGoesOnAfterARefitThatWasCalledOff) {
  Trainer trainer = make_trainer(source_);
  Engine sut = must(Engine::connect("flux", options(), soon()));
  must(sut.register_module(target_.spec(), soon()));
  Engine other = must(Engine::connect("slow", options(), soon()));
  OffloadedModel slow = make_offloaded_model();
  must(other.register_module(slow.spec(), soon()));
  {
    // The other engine never answers, so that this one holds still in vain.
    BackgroundRefit refit(trainer, {kWhole, {"slow", "transformer"}}, Deadline::in(500ms));
    EXPECT_FALSE(must(sut.wait(Deadline::in(2s))));
    EXPECT_EQ(code_of(refit.outcome()), Errc::engine_not_ready);
  }
  target_.fetch(3);
  EXPECT_TRUE(target_.resident(3));
}

INSTANTIATE_TEST_SUITE_P(Memory, Offload, ::testing::ValuesIn(memory_kinds()),
                         [](const auto& test) { return name_of(test.param); });

}  // namespace
}  // namespace refit::test
