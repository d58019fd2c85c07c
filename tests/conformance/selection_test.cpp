// Which bytes a refit writes: named subsets, renames, fused targets, shards, and nothing else.
//
// See refit_fixture.hpp for how the suite is built. What is not selected is proven unchanged by its
// digest, read through the ring.

#include <algorithm>

#include "conformance/refit_fixture.hpp"

namespace refit::test {
namespace {

TEST_P(Refit, SelectionLeavesEveryOtherDigestUnchanged) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  target.fill(2);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const auto before = digests("flux", "transformer");
  const std::vector<std::string> selected{"block.0.attn.weight", "scale"};
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit({"flux", "transformer", "", selected}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->tensors, 2U);
  const auto after = digests("flux", "transformer");
  ASSERT_EQ(after.size(), before.size());
  for (std::size_t i = 0; i < target.names().size(); ++i) {
    const std::string& name = target.names()[i];
    const bool is_selected = std::count(selected.begin(), selected.end(), name) != 0;
    EXPECT_EQ(after.at(name) != before.at(name), is_selected) << name;
    if (is_selected) {
      EXPECT_TRUE(target.tensor_equals(source, i)) << name;
    }
  }
}

TEST_P(Refit, SelectionsOfOneModuleDoNotReplaceEachOther) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  // The same selection again comes from the plan cache; another one must not.
  for (std::uint64_t step = 1; step <= 6; ++step) {
    const std::size_t index = step % 2;
    source.fill(step);
    const auto before = digests("flux", "transformer");
    must(trainer.refit({"flux", "transformer", "", {source.names()[index]}}, soon()));
    EXPECT_TRUE(target.tensor_equals(source, index));
    EXPECT_EQ(digests("flux", "transformer").at(source.names()[1 - index]),
              before.at(source.names()[1 - index]));
  }
}

TEST_P(Refit, SelectedNameThatTheTargetLacksIsRefused) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const auto before = digests("flux", "transformer");
  const auto refused =
      trainer.refit({"flux", "transformer", "", {"scale", "nowhere", "neither"}}, soon());
  EXPECT_EQ(code_of(refused), Errc::manifest_mismatch) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"nowhere", "flux/transformer"})) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"neither", "flux/transformer"})) << text_of(refused);
  EXPECT_EQ(digests("flux", "transformer"), before);
}

TEST_P(Refit, NameMapRenames) {
  Model source("policy", {{"model.in.weight", DType::float32, {8, 4}},
                          {"model.out.weight", DType::float32, {4, 8}}});
  Model target("transformer",
               {{"out.weight", DType::float32, {4, 8}}, {"in.weight", DType::float32, {8, 4}}});
  source.fill(1);
  source.spec().set_name_map({{R"(model\.(.*))", R"(\1)"}});
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit({"flux", "transformer", "policy"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  EXPECT_EQ(std::memcmp(target.data(0), source.data(1), target.bytes(0)), 0);
  EXPECT_EQ(std::memcmp(target.data(1), source.data(0), target.bytes(1)), 0);
}

// Goal: q, k and v of the trainer become the engine's one fused tensor, each in its place.
TEST_P(Refit, FusedTargetIsBuiltFromItsParts) {
  Model source("transformer", {{"attn.to_k.weight", DType::bfloat16, {4, 8}},
                               {"attn.to_q.weight", DType::bfloat16, {16, 8}},
                               {"attn.to_v.weight", DType::bfloat16, {4, 8}},
                               {"norm", DType::bfloat16, {8}}});
  Model target("transformer",
               {{"attn.to_qkv.weight", DType::bfloat16, {24, 8}}, {"norm", DType::bfloat16, {8}}});
  source.fill(1);
  source.spec().set_name_map({{R"((.*)\.to_q\.weight)", R"(\1.to_qkv.weight)", 0, 3},
                              {R"((.*)\.to_k\.weight)", R"(\1.to_qkv.weight)", 1, 3},
                              {R"((.*)\.to_v\.weight)", R"(\1.to_qkv.weight)", 2, 3}});
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  must(trainer.refit({"flux", "transformer", "", {"norm"}}, soon()));
  target.download();
  EXPECT_FALSE(std::memcmp(target.data(0), source.data(1), source.bytes(1)) == 0)
      << "a fused target that was not selected was written";
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  std::vector<std::byte> expected;
  for (const std::size_t part : {1U, 0U, 2U}) {
    expected.insert(expected.end(), source.data(part), source.data(part) + source.bytes(part));
  }
  ASSERT_EQ(expected.size(), target.bytes(0));
  EXPECT_EQ(std::memcmp(target.data(0), expected.data(), expected.size()), 0);
  EXPECT_TRUE(std::memcmp(target.data(1), source.data(3), target.bytes(1)) == 0);
}

TEST_P(Refit, FusedTargetThatLacksAPartIsRefused) {
  Model source("transformer", {{"to_q", DType::float32, {4, 8}}, {"to_v", DType::float32, {4, 8}}});
  Model target("transformer", {{"to_qkv", DType::float32, {12, 8}}});
  source.fill(1);
  source.spec().set_name_map({{"to_q", "to_qkv", 0, 3}, {"to_v", "to_qkv", 2, 3}});
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const auto before = digests("flux", "transformer");
  const auto refused = trainer.refit({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(refused), Errc::manifest_mismatch) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"to_qkv", "flux/transformer", "trainer/transformer"}))
      << text_of(refused);
  EXPECT_EQ(digests("flux", "transformer"), before);
}

TEST_P(Refit, SourceWithoutATargetIsRefusedUnlessAllowed) {
  auto more = small_tensors();
  more.push_back({"optimizer.step", DType::int64, {3}});
  Model source("transformer", more);
  Model target("transformer", small_tensors());
  source.fill(1);
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  const auto refused = trainer.refit({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(refused), Errc::manifest_mismatch) << text_of(refused);
  EXPECT_TRUE(
      one_detail_has(refused, {"optimizer.step", "trainer/transformer", "flux/transformer"}))
      << text_of(refused);
  RefitTarget allowed{"flux", "transformer"};
  allowed.allow_unmatched = true;
  const auto report = trainer.refit(allowed, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_EQ(report->tensors, small_tensors().size());
  for (std::size_t i = 0; i < small_tensors().size(); ++i)
    EXPECT_TRUE(target.tensor_equals(source, i));
}

/// Adds one shard of `global` rows x columns to a spec: rows [first, first + rows).
void add_rows(ModuleSpec& spec, const test::Model& memory, std::size_t index,
              const std::string& name, std::uint64_t rows, std::uint64_t columns,
              std::uint64_t first, std::uint64_t global_rows) {
  TensorSpec shard;
  shard.name = name;
  shard.dtype = DType::float32;
  shard.shape = {rows, columns};
  shard.region = spec.add_region(memory.memory_of(index));
  shard.offset_bytes =
      static_cast<std::uint64_t>(memory.address(index) - memory.memory_of(index)->data());
  shard.global_shape = {global_rows, columns};
  shard.box_offset = {first, 0};
  spec.add(std::move(shard));
}

TEST_P(Refit, ShardsOfTheSourceFillTheWholeTarget) {
  Model source("transformer",
               {{"rank0", DType::float32, {3, 5}}, {"rank1", DType::float32, {5, 5}}});
  Model target("transformer", {{"weight", DType::float32, {8, 5}}});
  source.fill(1);
  ModuleSpec sharded("transformer");
  add_rows(sharded, source, 0, "weight.rank0", 3, 5, 0, 8);
  add_rows(sharded, source, 1, "weight.rank1", 5, 5, 3, 8);
  sharded.set_fence(source.spec().fence());
  sharded.set_name_map({{R"((.*)\.rank\d)", R"(\1)"}});
  Trainer trainer = connect_trainer();
  must(trainer.register_module(sharded, soon()));
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  EXPECT_EQ(std::memcmp(target.data(0), source.data(0), source.bytes(0)), 0);
  EXPECT_EQ(std::memcmp(target.data(0) + source.bytes(0), source.data(1), source.bytes(1)), 0);
}

// Goal: an engine that holds one rank's rows gets those rows, and the memory around them stays.
TEST_P(Refit, ShardOfTheTargetGetsItsOwnRows) {
  Model source("transformer", {{"weight", DType::float32, {8, 5}}});
  Model target("transformer", {{"guard0", DType::float32, {16}},
                               {"rows", DType::float32, {3, 5}},
                               {"guard1", DType::float32, {16}}});
  Model before("transformer", {{"guard0", DType::float32, {16}},
                               {"rows", DType::float32, {3, 5}},
                               {"guard1", DType::float32, {16}}});
  source.fill(1);
  target.fill(2);
  before.fill(2);
  ModuleSpec rank("transformer");
  add_rows(rank, target, 1, "weight", 3, 5, 2, 8);
  rank.set_fence(target.spec().fence());
  Trainer trainer = make_trainer(source);
  Engine engine = must(Engine::connect("flux", options(), soon()));
  must(engine.register_module(rank, soon()));
  const WaitingEngine waiting(engine);
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  target.download();
  constexpr std::size_t kRowBytes = 5 * 4;
  EXPECT_EQ(std::memcmp(target.data(1), source.data(0) + 2 * kRowBytes, 3 * kRowBytes), 0);
  EXPECT_TRUE(target.tensor_equals(before, 0));
  EXPECT_TRUE(target.tensor_equals(before, 2));
}

TEST_P(Refit, ShardsThatLeaveRowsUncoveredAreRefused) {
  Model source("transformer", {{"rank0", DType::float32, {3, 5}}});
  Model target("transformer", {{"weight", DType::float32, {8, 5}}});
  ModuleSpec sharded("transformer");
  add_rows(sharded, source, 0, "weight", 3, 5, 0, 8);
  Trainer trainer = connect_trainer();
  must(trainer.register_module(sharded, soon()));
  Engine engine = make_engine("flux", target);
  const auto before = digests("flux", "transformer");
  const auto refused = trainer.refit({"flux", "transformer"}, soon());
  EXPECT_EQ(code_of(refused), Errc::manifest_mismatch) << text_of(refused);
  EXPECT_TRUE(one_detail_has(refused, {"weight", "flux/transformer", "trainer/transformer"}))
      << text_of(refused);
  EXPECT_EQ(digests("flux", "transformer"), before);
}

}  // namespace
}  // namespace refit::test
