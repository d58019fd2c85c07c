// Layer buffers: what a manifest may say of them, what a plan makes of them, and which residency
// words are believed.

#include "plan/residency.hpp"

#include <gtest/gtest.h>

#include "ipc/residency_word.hpp"
#include "unit/plan/plan_support.hpp"

namespace refit::daemon {
namespace {

using namespace refit::daemon::testing;  // NOLINT: builders of this folder

constexpr std::uint64_t kPoolInode = 300;

TensorSpec layered(TensorSpec spec, std::uint32_t buffer, std::uint64_t offset_bytes) {
  spec.layer_buffer = buffer;
  spec.layer_offset_bytes = offset_bytes;
  return spec;
}

RegionInfo pool(std::uint64_t bytes, std::uint64_t inode = kPoolInode) {
  RegionInfo info = region(bytes, inode);
  info.pool = true;
  return info;
}

Result<ManifestPtr> try_layers(std::vector<TensorSpec> tensors, std::vector<std::uint64_t> buffers,
                               std::vector<RegionInfo> regions = {region(4096, kEngineInode),
                                                                  pool(4096)},
                               Role role = Role::engine) {
  return Manifest::validate("flux/dit", role, std::move(tensors), std::move(regions), {}, {},
                            std::move(buffers));
}

/// Two layers of two tensors each; "far" stays.
std::vector<TensorSpec> two_layers() {
  return {layered(tensor("0.a", {3}, 0), 0, 0), layered(tensor("0.b", {5}, 32), 0, 32),
          layered(tensor("1.a", {3}, 64), 1, 0), layered(tensor("1.b", {5}, 76), 1, 12),
          tensor("far", {4}, 512)};
}

ManifestPtr layers() {
  auto made = try_layers(two_layers(), {52, 32});
  EXPECT_TRUE(made) << made.error().to_string();
  return *made;
}

std::string only_detail(const Result<ManifestPtr>& result) {
  if (result) return "ok";
  return result.error().details.size() == 1 ? result.error().details.front()
                                            : result.error().to_string();
}

std::uint64_t at(std::uint64_t offset, std::uint8_t in = 1) {
  return ResidencyWord{ResidencyState::resident, in, 1, offset}.pack();
}
std::uint64_t away() { return ResidencyWord{ResidencyState::absent, 0, 9, 0}.pack(); }

TEST(ResidencyWord, PacksAndUnpacks) {
  const ResidencyWord word{ResidencyState::resident, 63, 0xabcd, ResidencyWord::kOffsetMax};
  const ResidencyWord got = ResidencyWord::unpack(word.pack());
  EXPECT_EQ(got.state, word.state);
  EXPECT_EQ(got.region, word.region);
  EXPECT_EQ(got.generation, word.generation);
  EXPECT_EQ(got.offset, word.offset);
  EXPECT_EQ(ResidencyWord::unpack(0).state, ResidencyState::unsaid);
}

TEST(LayerBuffers, ManifestRefusesWhatCannotBe) {
  EXPECT_NE(only_detail(try_layers({layered(tensor("a", {4}), 1, 0)}, {64}))
                .find("layer buffer 1 does not exist, the manifest has 1"),
            std::string::npos);
  EXPECT_NE(only_detail(try_layers({layered(tensor("a", {4}), 0, 49)}, {64}))
                .find("leave layer buffer 0, which has 64 bytes"),
            std::string::npos);
  EXPECT_NE(only_detail(try_layers({layered(tensor("a", {4}), 0, ~std::uint64_t{0})}, {64}))
                .find("leave layer buffer 0"),
            std::string::npos);
  // Apart on the host, together on the device.
  EXPECT_NE(
      only_detail(
          try_layers({layered(tensor("a", {4}), 0, 0), layered(tensor("b", {4}, 16), 0, 8)}, {64}))
          .find("offset 0 of layer buffer 0 and offset 8 of layer buffer 0"),
      std::string::npos);
  EXPECT_NE(only_detail(try_layers({in_region(tensor("a", {4}), 1)}, {}))
                .find("region 1, which is a pool"),
            std::string::npos);
  EXPECT_NE(only_detail(try_layers({tensor("a", {4})}, {},
                                   {region(4096, kEngineInode), pool(4096, kEngineInode)}))
                .find("region 1, a pool, and region 0 are the same memory"),
            std::string::npos);
  EXPECT_NE(only_detail(try_layers({tensor("a", {4})}, {},
                                   {region(4096, kEngineInode), pool(64), pool(64)}))
                .find("region 1, a pool, and region 2 are the same memory"),
            std::string::npos);
  EXPECT_NE(
      only_detail(try_layers({tensor("a", {4})}, {64}, {region(4096, kEngineInode)}, Role::trainer))
          .find("only an engine has pools and layer buffers"),
      std::string::npos);
  EXPECT_NE(only_detail(try_layers({tensor("a", {4})}, std::vector<std::uint64_t>(1025, 1)))
                .find("1025 layer buffers, the limit is 1024"),
            std::string::npos);
}

TEST(LayerBuffers, ModulesDoNotShareAPool) {
  const ManifestPtr one = layers();
  const ManifestPtr other =
      *try_layers({in_region(tensor("a", {4}), 0)}, {}, {region(64, kPoolInode)});
  ASSERT_EQ(one->shared_with(*other).size(), 1U);
  EXPECT_NE(one->shared_with(*other)[0].find("a pool of flux/dit"), std::string::npos);
  EXPECT_EQ(other->shared_with(*one).size(), 1U);
}

// Goal: device copies are the host's, relative to their buffer and merged where they touch.
TEST(LayerBuffers, PlanHasTheSameBytesForEveryBuffer) {
  const ManifestPtr target = layers();
  const ManifestPtr source =
      *try_trainer({tensor("0.a", {3}, 0), tensor("0.b", {5}, 12), tensor("1.a", {3}, 32),
                    tensor("1.b", {5}, 44), tensor("far", {4}, 64)});
  const auto plan = Plan::compile(*source, *target, {});
  ASSERT_TRUE(plan) << plan.error().to_string();
  EXPECT_EQ(plan->bytes, 80U);
  EXPECT_EQ(plan->layer_bytes, 64U);
  ASSERT_EQ(plan->layer_copies.size(), 3U);
  const auto is = [](const Copy& copy, std::uint32_t buffer, std::uint64_t offset,
                     std::uint64_t from, std::uint64_t bytes) {
    return copy.target_region == buffer && copy.target_offset == offset &&
           copy.source_offset == from && copy.run_bytes == bytes && copy.loop_count == 0;
  };
  EXPECT_TRUE(is(plan->layer_copies[0], 0, 0, 0, 12));
  EXPECT_TRUE(is(plan->layer_copies[1], 0, 32, 12, 20)) << "padding lies between";
  EXPECT_TRUE(is(plan->layer_copies[2], 1, 0, 32, 32)) << "adjacent tensors are one copy";
}

TEST(LayerBuffers, SourceInAPoolIsRefused) {
  const auto source = Manifest::validate("trainer/dit", Role::trainer, {tensor("far", {4})},
                                         {region(4096, kPoolInode)}, {});
  PlanOptions options;
  options.selection = {"far"};
  const auto plan = Plan::compile(**source, *layers(), options);
  ASSERT_FALSE(plan);
  EXPECT_NE(plan.error().to_string().find("a pool of flux/dit is also memory of trainer/dit"),
            std::string::npos)
      << plan.error().to_string();
}

TEST(LayerPlaces, HonestWordsAreTaken) {
  const ManifestPtr manifest = layers();
  LayerPlaces sut(*manifest);
  const std::uint64_t words[] = {at(64), at(0)};
  ASSERT_TRUE(sut.read(*manifest, words));
  EXPECT_TRUE(sut[0].resident && sut[0].region == 1 && sut[0].offset == 64);
  EXPECT_TRUE(sut[1].resident && sut[1].offset == 0);
  const std::uint64_t later[] = {away(), at(4096 - 32)};
  ASSERT_TRUE(sut.read(*manifest, later));
  EXPECT_FALSE(sut[0].resident);
}

TEST(LayerPlaces, NonsenseIsRefusedByName) {
  const ManifestPtr manifest = layers();
  LayerPlaces sut(*manifest);
  const auto refused = [&](std::uint64_t first, std::uint64_t second, const std::string& what) {
    const std::uint64_t words[] = {first, second};
    const auto result = sut.read(*manifest, words);
    if (result) return false;
    EXPECT_EQ(result.error().code, Errc::bad_region);
    return result.error().message.find("flux/dit: layer buffer") == 0 &&
           result.error().message.find(what) != std::string::npos;
  };
  EXPECT_TRUE(refused(0, away(), "buffer 0 (tensor '0.a'): the engine does not say"));
  EXPECT_TRUE(
      refused(away(), ~std::uint64_t{0}, "buffer 1 (tensor '1.a'): the engine says nonsense"));
  EXPECT_TRUE(refused(at(0, 0), away(), "region 0, which is no pool"));
  EXPECT_TRUE(refused(at(0, 2), away(), "region 2, which is no pool"));
  EXPECT_TRUE(refused(at(4096 - 32), away(), "its 52 bytes are at offset 4064"));
  EXPECT_TRUE(refused(at(ResidencyWord::kOffsetMax - 31), away(), "which has 4096 bytes"));
  EXPECT_TRUE(refused(at(33), away(), "no multiple of 32"));
  EXPECT_TRUE(refused(at(0), at(32), "resident in the same bytes"));
  EXPECT_TRUE(refused(at(32), at(32), "resident in the same bytes"));
  EXPECT_FALSE(refused(at(0), at(64), ""));
}

}  // namespace
}  // namespace refit::daemon
