// Plan::compile: every kind of mismatch with both sides named, fusion, boxes, strides, merging,
// selection, aliasing. One thread; pure, so no files and no sockets.
#include "plan/plan.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "plan_support.hpp"

namespace refit::daemon {
namespace {

using namespace testing;  // NOLINT: the tests read as sentences only without the prefix.

Result<Plan> compile(const ManifestPtr& source, const ManifestPtr& target,
                     const PlanOptions& options = {}) {
  return Plan::compile(*source, *target, options);
}

void expect_mismatch(const Result<Plan>& result,
                     const std::vector<std::vector<std::string>>& expected) {
  expect_problems(result, Errc::manifest_mismatch, expected);
}

Plan good(const Result<Plan>& result) {
  if (result) return *result;
  ADD_FAILURE() << result.error().to_string();
  return {};
}

struct Contiguous {
  std::uint64_t source = 0;
  std::uint64_t target = 0;
  std::uint64_t bytes = 0;
};

void expect_copies(const Plan& plan, const std::vector<Contiguous>& expected) {
  ASSERT_EQ(plan.copies.size(), expected.size());
  for (std::size_t i = 0; i < expected.size(); ++i) {
    SCOPED_TRACE("copy " + std::to_string(i));
    EXPECT_EQ(plan.copies[i].loop_count, 0U);
    EXPECT_EQ(plan.copies[i].source_offset, expected[i].source);
    EXPECT_EQ(plan.copies[i].target_offset, expected[i].target);
    EXPECT_EQ(plan.copies[i].run_bytes, expected[i].bytes);
  }
}

/// A buffer of 32-bit elements that count from `first`.
Memory counting(std::size_t elements, std::uint32_t first = 1) {
  std::vector<std::uint8_t> bytes(elements * 4);
  for (std::size_t i = 0; i < elements; ++i) {
    const auto value = static_cast<std::uint32_t>(first + i);
    std::memcpy(bytes.data() + 4 * i, &value, 4);
  }
  return {bytes};
}

std::vector<std::uint32_t> elements_of(const Memory& memory) {
  std::vector<std::uint32_t> values(memory[0].size() / 4);
  std::memcpy(values.data(), memory[0].data(), memory[0].size());
  return values;
}

/// What the target's region holds after the plan, of `elements` zeros and a counting source.
std::vector<std::uint32_t> executed(const Plan& plan, std::size_t source_elements,
                                    std::size_t target_elements) {
  const Memory source = counting(source_elements);
  Memory target = {std::vector<std::uint8_t>(target_elements * 4)};
  execute(plan, source, target);
  return elements_of(target);
}

using Values = std::vector<std::uint32_t>;

// ---- what fits

TEST(Plan, EqualTensorBecomesOneContiguousCopy) {
  const Plan sut =
      good(compile(trainer({tensor("w", {3, 4}, 8)}), engine({tensor("w", {3, 4}, 32)})));
  expect_copies(sut, {{8, 32, 48}});
  EXPECT_EQ(sut.bytes, 48U);
  EXPECT_EQ(sut.targets, std::vector<std::uint32_t>{0});
  EXPECT_TRUE(sut.whole);
}

TEST(Plan, NothingToNothingIsAWholeEmptyPlan) {
  const Plan sut = good(compile(trainer({}), engine({})));
  EXPECT_TRUE(sut.copies.empty());
  EXPECT_TRUE(sut.whole);
  EXPECT_EQ(sut.bytes, 0U);
}

TEST(Plan, ScalarIsCopied) {
  expect_copies(good(compile(trainer({tensor("s", {}, 4)}), engine({tensor("s", {}, 12)}))),
                {{4, 12, 4}});
}

TEST(Plan, EmptyTensorIsATargetWithoutCopies) {
  const Plan sut =
      good(compile(trainer({tensor("none", {0, 3})}), engine({tensor("none", {0, 3})})));
  EXPECT_TRUE(sut.copies.empty());
  EXPECT_EQ(sut.targets.size(), 1U);
  EXPECT_TRUE(sut.whole);
}

TEST(Plan, FiveDimensionsAreOneRun) {
  const Dims shape = {6, 4, 1, 2, 2};
  expect_copies(good(compile(trainer({tensor("patch", shape)}), engine({tensor("patch", shape)}))),
                {{0, 0, 384}});
}

TEST(Plan, FiveDimensionalBoxKeepsOnlyTheLoopsThatItNeeds) {
  // The middle of three slices of dimension 1 of (2, 3, 1, 2, 2) is two runs of four elements.
  const Plan sut = good(
      compile(trainer({tensor("w", {2, 3, 1, 2, 2})}),
              engine({boxed(tensor("w", {2, 1, 1, 2, 2}), {2, 3, 1, 2, 2}, {0, 1, 0, 0, 0})})));
  ASSERT_EQ(sut.copies.size(), 1U);
  const Copy& copy = sut.copies[0];
  EXPECT_EQ(copy.run_bytes, 16U);
  ASSERT_EQ(copy.loop_count, 1U);
  EXPECT_EQ(copy.loops[0].count, 2U);
  EXPECT_EQ(copy.loops[0].source_stride_bytes, 48U);
  EXPECT_EQ(copy.loops[0].target_stride_bytes, 16U);
  EXPECT_EQ(copy.source_offset, 16U);
  EXPECT_EQ(copy.bytes(), 32U);
  EXPECT_EQ(executed(sut, 24, 8), (Values{5, 6, 7, 8, 17, 18, 19, 20}));
}

TEST(Plan, EightDimensionsAllReversedUseEightLoops) {
  const Dims shape(8, 2);
  const Plan sut =
      good(compile(trainer({strided(tensor("w", shape), {1, 2, 4, 8, 16, 32, 64, 128})}),
                   engine({strided(tensor("w", shape), {256, 128, 64, 32, 16, 8, 4, 2})})));
  ASSERT_EQ(sut.copies.size(), 1U);
  EXPECT_EQ(sut.copies[0].loop_count, 8U);
  EXPECT_EQ(sut.copies[0].bytes(), 1024U);
}

TEST(Plan, CopiesAreOrderedByTargetAndAdjacentOnesMerge) {
  // b and a are neighbours on both sides; c is a neighbour in the target only.
  const ManifestPtr source =
      trainer({tensor("a", {2}, 8), tensor("b", {2}, 0), tensor("c", {2}, 64)});
  const ManifestPtr target =
      engine({tensor("c", {2}, 32), tensor("a", {2}, 24), tensor("b", {2}, 16)});
  const Plan sut = good(compile(source, target));
  expect_copies(sut, {{0, 16, 16}, {64, 32, 8}});
  EXPECT_EQ(sut.targets, (std::vector<std::uint32_t>{0, 1, 2}));
  EXPECT_EQ(sut.bytes, 24U);
}

TEST(Plan, PaddingBetweenTensorsIsNeverCopied) {
  const ManifestPtr source = trainer({tensor("a", {1}, 0), tensor("b", {1}, 8)});
  const ManifestPtr target = engine({tensor("a", {1}, 0), tensor("b", {1}, 8)});
  expect_copies(good(compile(source, target)), {{0, 0, 4}, {8, 8, 4}});
}

TEST(Plan, NeighboursInDifferentRegionsDoNotMerge) {
  const auto with = [](Role role, std::uint64_t inode, std::uint32_t second) {
    return valid(Manifest::validate("x/y", role,
                                    {tensor("a", {2}, 0), in_region(tensor("b", {2}, 8), second)},
                                    {region(64, inode), region(64, inode + 1)}, {}));
  };
  EXPECT_EQ(good(compile(with(Role::trainer, 10, 0), with(Role::engine, 20, 0))).copies.size(), 1U);
  EXPECT_EQ(good(compile(with(Role::trainer, 10, 1), with(Role::engine, 20, 0))).copies.size(), 2U);
  EXPECT_EQ(good(compile(with(Role::trainer, 10, 0), with(Role::engine, 20, 1))).copies.size(), 2U);
  const Plan sut = good(compile(with(Role::trainer, 10, 1), with(Role::engine, 20, 1)));
  ASSERT_EQ(sut.copies.size(), 2U);
  EXPECT_EQ(sut.copies[1].source_region, 1U);
  EXPECT_EQ(sut.copies[1].target_region, 1U);
}

TEST(Plan, TransposedSourceIsCopiedElementByElement) {
  const Plan sut =
      good(compile(trainer({strided(tensor("w", {2, 3}), {1, 2})}), engine({tensor("w", {2, 3})})));
  EXPECT_EQ(executed(sut, 6, 6), (Values{1, 3, 5, 2, 4, 6}));
}

TEST(Plan, TransposedTargetIsCopiedElementByElement) {
  const Plan sut =
      good(compile(trainer({tensor("w", {2, 3})}), engine({strided(tensor("w", {2, 3}), {1, 2})})));
  EXPECT_EQ(executed(sut, 6, 6), (Values{1, 4, 2, 5, 3, 6}));
}

TEST(Plan, SamePermutationOnBothSidesIsOneRun) {
  expect_copies(good(compile(trainer({strided(tensor("w", {2, 3, 4}), {1, 8, 2})}),
                             engine({strided(tensor("w", {2, 3, 4}), {1, 8, 2})}))),
                {{0, 0, 96}});
}

TEST(Plan, PaddedRowsOfTheTargetStayUntouched) {
  const Plan sut =
      good(compile(trainer({tensor("w", {2, 3})}), engine({strided(tensor("w", {2, 3}), {4, 1})})));
  EXPECT_EQ(executed(sut, 6, 8), (Values{1, 2, 3, 0, 4, 5, 6, 0}));
}

TEST(Plan, ExpandedSourceFillsTheTarget) {
  const Plan rows =
      good(compile(trainer({strided(tensor("w", {3, 2}), {0, 1})}), engine({tensor("w", {3, 2})})));
  EXPECT_EQ(executed(rows, 2, 6), (Values{1, 2, 1, 2, 1, 2}));
  const Plan columns =
      good(compile(trainer({strided(tensor("w", {2, 3}), {1, 0})}), engine({tensor("w", {2, 3})})));
  EXPECT_EQ(executed(columns, 2, 6), (Values{1, 1, 1, 2, 2, 2}));
  const Plan all =
      good(compile(trainer({strided(tensor("w", {2, 2}), {0, 0})}), engine({tensor("w", {2, 2})})));
  EXPECT_EQ(executed(all, 1, 4), (Values{1, 1, 1, 1}));
}

TEST(Plan, StrideOfADimensionOfOneMeansNothing) {
  const std::uint64_t wild = std::numeric_limits<std::uint64_t>::max();
  expect_copies(good(compile(trainer({strided(tensor("w", {1, 4}), {wild, 1})}),
                             engine({strided(tensor("w", {1, 4}), {3, 1})}))),
                {{0, 0, 16}});
}

// ---- fusion

const std::vector<NameRule> kQkv = {{"^(.*)\\.q$", "\\1.qkv", 0, 3},
                                    {"^(.*)\\.k$", "\\1.qkv", 1, 3},
                                    {"^(.*)\\.v$", "\\1.qkv", 2, 3}};

TEST(Plan, FusedPartsAreStackedInPartOrder) {
  const ManifestPtr source = trainer(
      {tensor("a.v", {1, 2}, 0), tensor("a.q", {1, 2}, 8), tensor("a.k", {1, 2}, 16)}, kQkv);
  const Plan sut = good(compile(source, engine({tensor("a.qkv", {3, 2})})));
  EXPECT_EQ(executed(sut, 6, 6), (Values{3, 4, 5, 6, 1, 2}));
  expect_copies(sut, {{8, 0, 16}, {0, 16, 8}});
}

TEST(Plan, FusedPartsOfUnequalRowsAreStackedByTheirExtents) {
  const std::vector<NameRule> rules = {{"q", "linear1", 0, 4},
                                       {"k", "linear1", 1, 4},
                                       {"v", "linear1", 2, 4},
                                       {"mlp", "linear1", 3, 4}};
  const std::uint64_t row = 3072 * 4;
  std::vector<TensorSpec> parts = {tensor("mlp", {12288, 3072}), tensor("q", {3072, 3072}),
                                   tensor("k", {3072, 3072}), tensor("v", {3072, 3072})};
  const std::uint64_t bytes = pack(parts, 4096) + 1;
  const Plan sut = good(
      compile(trainer(parts, rules, bytes), engine({tensor("linear1", {21504, 3072})}, bytes)));
  expect_copies(sut, {{12288 * row, 0, 9216 * row}, {0, 9216 * row, 12288 * row}});
}

TEST(Plan, FusedBiasesAndScalarRowsWork) {
  const ManifestPtr source =
      trainer({tensor("a.q", {2}, 0), tensor("a.k", {0}, 8), tensor("a.v", {3}, 8)}, kQkv);
  expect_copies(good(compile(source, engine({tensor("a.qkv", {5})}))), {{0, 0, 20}});
}

TEST(Plan, FusedPartsReachAShardedTarget) {
  // Rank 1 of two holds rows 3 to 5 of six: the last row of k and both of v.
  const ManifestPtr source = trainer(
      {tensor("a.q", {2, 1}, 0), tensor("a.k", {2, 1}, 8), tensor("a.v", {2, 1}, 16)}, kQkv);
  const ManifestPtr target = engine({boxed(tensor("a.qkv", {3, 1}), {6, 1}, {3, 0})});
  EXPECT_EQ(executed(good(compile(source, target)), 6, 3), (Values{4, 5, 6}));
}

TEST(Plan, ShardedFusedPartsAreStacked) {
  const std::vector<NameRule> rules = {{"q\\d", "qk", 0, 2}, {"k\\d", "qk", 1, 2}};
  const ManifestPtr source = trainer({boxed(tensor("k1", {1, 2}, 0), {2, 2}, {1, 0}),
                                      boxed(tensor("q0", {2, 1}, 8), {2, 2}, {0, 0}),
                                      boxed(tensor("q1", {2, 1}, 16), {2, 2}, {0, 1}),
                                      boxed(tensor("k0", {1, 2}, 24), {2, 2}, {0, 0})},
                                     rules);
  EXPECT_EQ(executed(good(compile(source, engine({tensor("qk", {4, 2})}))), 8, 8),
            (Values{3, 5, 4, 6, 7, 8, 1, 2}));
}

TEST(Plan, MissingPartsAreListedWithThosePresent) {
  const ManifestPtr target = engine({tensor("a.qkv", {3, 2})});
  expect_mismatch(
      compile(trainer({tensor("a.q", {1, 2}, 0), tensor("a.v", {1, 2}, 8)}, kQkv), target),
      {{"'a.qkv'", "engine/transformer", "1 of the 3 parts", "(part 1)", "'a.q'", "'a.v'",
        "trainer/dit"}});
  expect_mismatch(compile(trainer({tensor("a.k", {1, 2}, 0)}, kQkv), target),
                  {{"'a.qkv'", "2 of the 3 parts", "(part 0, 2)", "'a.k'"}});
}

TEST(Plan, BillionsOfMissingPartsAreCountedNotWalked) {
  const ManifestPtr source =
      trainer({tensor("a", {1})}, {{"a", "w", 4'000'000'000, 4'294'967'295}});
  expect_mismatch(compile(source, engine({tensor("w", {3})})),
                  {{"'w'", "4294967294 of the 4294967295 parts", "0, 1, 2, 3, 4, 5, 6, 7, ..."}});
}

TEST(Plan, SourcesThatDisagreeOnThePartsAreRefused) {
  const ManifestPtr target = engine({tensor("a.qkv", {3, 2})});
  expect_mismatch(compile(trainer({tensor("a.q", {1, 2}), tensor("x", {1, 2}, 8)},
                                  {{"a.q", "a.qkv", 0, 3}, {"x", "a.qkv", 1, 2}}),
                          target),
                  {{"'a.qkv'", "disagree", "part 0 of 3 'a.q'", "part 1 of 2 'x'"}});
  // A part between two wholes.
  expect_mismatch(compile(trainer({tensor("a.qkv", {3, 2}), tensor("a.q", {3, 2}, 64),
                                   tensor("b", {3, 2}, 128)},
                                  {{"a.q", "a.qkv", 0, 3}, {"b", "a.qkv"}}),
                          target),
                  {{"'a.qkv'", "disagree", "part 0 of 3 'a.q'"}});
}

TEST(Plan, FusedRowsThatDoNotAddUpAreRefused) {
  expect_mismatch(
      compile(trainer({tensor("a.q", {1, 2}), tensor("a.k", {1, 2}, 8), tensor("a.v", {2, 2}, 16)},
                      kQkv),
              engine({tensor("a.qkv", {3, 2})})),
      {{"'a.qkv'", "(3, 2)", "have 4 rows together, it has 3", "'a.v' (torch.float32, (2, 2))"}});
}

TEST(Plan, FusedRowsThatOverflowAreRefused) {
  const std::uint64_t many = 1ULL << 63;
  const auto part = [&](const char* name) {
    return boxed(tensor(name, {1}, 0, DType::uint8), {many}, {0});
  };
  expect_mismatch(compile(trainer({part("a.q"), part("a.k"), part("a.v")}, kQkv),
                          engine({tensor("a.qkv", {1}, 0, DType::uint8)})),
                  {{"'a.qkv'", "more than 2^64 rows"}});
}

TEST(Plan, FusedPartsOfOtherShapeAreAllListed) {
  expect_mismatch(
      compile(
          trainer({tensor("a.q", {1, 2}), tensor("a.k", {1, 3}, 8), tensor("a.v", {1}, 32)}, kQkv),
          engine({tensor("a.qkv", {3, 2})})),
      {{"'a.qkv'", "'a.k'", "(1, 3)", "part 1 of 3", "another shape beyond"},
       {"'a.qkv'", "'a.v'", "(1,)", "part 2 of 3", "another shape beyond"}});
}

TEST(Plan, BoxesOfOnePartMustBeOfOneShape) {
  const std::vector<NameRule> rules = {{"q\\d", "qk", 0, 2}, {"k", "qk", 1, 2}};
  expect_mismatch(
      compile(trainer({boxed(tensor("q0", {1, 2}), {2, 2}, {0, 0}),
                       boxed(tensor("q1", {1, 2}, 8), {3, 2}, {1, 0}), tensor("k", {2, 2}, 16)},
                      rules),
              engine({tensor("qk", {4, 2})})),
      {{"'qk'", "part 0 of 2", "'q0'", "'q1'", "(3, 2)"}});
}

TEST(Plan, ScalarCannotBeFused) {
  expect_mismatch(
      compile(trainer({tensor("a.q", {}), tensor("a.k", {}, 4), tensor("a.v", {}, 8)}, kQkv),
              engine({tensor("a.qkv", {})})),
      {{"'a.qkv'", "no dimension 0", "'a.q'"}});
}

TEST(Plan, OnePartTwiceIsRefused) {
  std::vector<NameRule> rules = kQkv;
  rules.push_back({"again", "a.qkv", 1, 3});
  expect_mismatch(compile(trainer({tensor("a.q", {1, 2}), tensor("a.k", {1, 2}, 8),
                                   tensor("a.v", {1, 2}, 16), tensor("again", {1, 2}, 24)},
                                  rules),
                          engine({tensor("a.qkv", {3, 2})})),
                  {{"'a.qkv'", "'a.k'", "'again'", "both write", "[1:2, 0:2]"}});
}

// ---- boxes

const std::vector<NameRule> kRanks = {{"(.*)\\.rank\\d+", "\\1"}};

TEST(Plan, RowShardsOfTheSourceMakeAWholeTarget) {
  const ManifestPtr source = trainer({boxed(tensor("w.rank1", {1, 2}, 0), {3, 2}, {2, 0}),
                                      boxed(tensor("w.rank0", {2, 2}, 8), {3, 2}, {0, 0})},
                                     kRanks);
  EXPECT_EQ(executed(good(compile(source, engine({tensor("w", {3, 2})}))), 6, 6),
            (Values{3, 4, 5, 6, 1, 2}));
}

TEST(Plan, ColumnShardsOfTheSourceMakeAWholeTarget) {
  const ManifestPtr source = trainer({boxed(tensor("w.rank0", {2, 1}, 0), {2, 3}, {0, 0}),
                                      boxed(tensor("w.rank1", {2, 2}, 8), {2, 3}, {0, 1})},
                                     kRanks);
  EXPECT_EQ(executed(good(compile(source, engine({tensor("w", {2, 3})}))), 6, 6),
            (Values{1, 3, 4, 2, 5, 6}));
}

TEST(Plan, WholeSourceFillsAColumnShardOfTheTarget) {
  const ManifestPtr target = engine({boxed(tensor("w", {2, 1}), {2, 3}, {0, 2})});
  EXPECT_EQ(executed(good(compile(trainer({tensor("w", {2, 3})}), target)), 6, 2), (Values{3, 6}));
}

TEST(Plan, RowShardsFillAColumnShard) {
  // Resharding: the source is cut by rows, the target by columns; one source row is another rank's.
  const ManifestPtr source = trainer({boxed(tensor("w.rank0", {2, 4}, 0), {4, 4}, {0, 0}),
                                      boxed(tensor("w.rank1", {2, 4}, 32), {4, 4}, {2, 0})},
                                     kRanks);
  const ManifestPtr target = engine({boxed(tensor("w", {4, 2}), {4, 4}, {0, 2})});
  EXPECT_EQ(executed(good(compile(source, target)), 16, 8), (Values{3, 4, 7, 8, 11, 12, 15, 16}));
}

TEST(Plan, ShardsOutsideTheTargetsBoxAreOtherRanks) {
  const ManifestPtr source = trainer(
      {boxed(tensor("w.rank0", {2}, 0), {4}, {0}), boxed(tensor("w.rank1", {2}, 8), {4}, {2})},
      kRanks);
  expect_copies(good(compile(source, engine({boxed(tensor("w", {2}), {4}, {2})}))), {{8, 0, 8}});
}

TEST(Plan, ReplicasAreRefusedAsDuplicates) {
  const ManifestPtr source =
      trainer({tensor("w.rank0", {2, 2}), tensor("w.rank1", {2, 2}, 16)}, kRanks);
  expect_mismatch(compile(source, engine({tensor("w", {2, 2})})),
                  {{"'w' (torch.float32, (2, 2)) of engine/transformer", "'w.rank0'", "'w.rank1'",
                    "trainer/dit", "both write its elements [0:2, 0:2]"}});
}

TEST(Plan, ReplicatedScalarsAreRefusedAsDuplicates) {
  expect_mismatch(compile(trainer({tensor("s.rank0", {}), tensor("s.rank1", {}, 4)}, kRanks),
                          engine({tensor("s", {})})),
                  {{"'s'", "'s.rank0'", "'s.rank1'", "both write"}});
}

TEST(Plan, ManyReplicasAreOneLineEach) {
  std::vector<TensorSpec> tensors;
  for (std::uint64_t i = 0; i < 1'000; ++i) {
    tensors.push_back(tensor("w.rank" + std::to_string(i), {2}, i * 8));
  }
  const auto result = compile(trainer(tensors, kRanks), engine({tensor("w", {2})}));
  ASSERT_FALSE(result.has_value());
  EXPECT_EQ(result.error().details.size(), 999U);
}

TEST(Plan, PartlyOverlappingShardsAreRefusedWithTheirIntersection) {
  const ManifestPtr source = trainer({boxed(tensor("w.rank0", {3, 2}, 0), {4, 2}, {0, 0}),
                                      boxed(tensor("w.rank1", {2, 2}, 32), {4, 2}, {2, 0})},
                                     kRanks);
  expect_mismatch(compile(source, engine({tensor("w", {4, 2})})), {{"'w'", "[2:3, 0:2]"}});
}

TEST(Plan, OverlapOutsideTheTargetsBoxIsNobodysProblem) {
  const ManifestPtr source = trainer(
      {boxed(tensor("w.rank0", {3}, 0), {4}, {0}), boxed(tensor("w.rank1", {2}, 16), {4}, {2})},
      kRanks);
  expect_copies(good(compile(source, engine({boxed(tensor("w", {2}), {4}, {0})}))), {{0, 0, 8}});
}

TEST(Plan, BytesThatNoShardCoversAreRefused) {
  const ManifestPtr source = trainer({boxed(tensor("w.rank0", {1, 4}, 0), {4, 4}, {0, 0}),
                                      boxed(tensor("w.rank1", {2, 4}, 16), {4, 4}, {2, 0})},
                                     kRanks);
  expect_mismatch(
      compile(source, engine({tensor("w", {4, 4})})),
      {{"'w' (torch.float32, (4, 4)) of engine/transformer", "4 of its 16 elements",
        "'w.rank0' (torch.float32, (1, 4) at (0, 0) of (4, 4)) of trainer/dit", "'w.rank1'"}});
}

TEST(Plan, GapThatAnOverlapWouldFillByCountIsStillRefused) {
  // Twice the first half: as many elements as the target, but not its elements.
  const ManifestPtr source = trainer(
      {boxed(tensor("w.rank0", {2}, 0), {4}, {0}), boxed(tensor("w.rank1", {2}, 8), {4}, {0})},
      kRanks);
  expect_mismatch(compile(source, engine({tensor("w", {4})})), {{"'w'", "both write"}});
}

TEST(Plan, GridsOfShardsAreTakenWhicheverWayTheyAreCut) {
  // Goal: the search for overlaps is not quadratic in any usual cut. Method: 16,384 shards by rows,
  // by columns, and as a grid of 128 x 128; all pairs of them would be 134 million.
  const Dims global = {16'384, 16'384};
  const auto cut = [&](std::uint64_t rows, std::uint64_t columns) {
    std::vector<TensorSpec> tensors;
    const Dims shape = {global[0] / rows, global[1] / columns};
    for (std::uint64_t i = 0; i < rows; ++i) {
      for (std::uint64_t j = 0; j < columns; ++j) {
        // One element each, expanded: offsets do not matter here.
        TensorSpec shard =
            tensor("w.rank" + std::to_string(tensors.size()), shape, 0, DType::uint8);
        tensors.push_back(boxed(strided(shard, {0, 0}), global, {i * shape[0], j * shape[1]}));
      }
    }
    return trainer(tensors, kRanks);
  };
  const ManifestPtr target = engine({tensor("w", global, 0, DType::uint8)}, 1ULL << 28);
  EXPECT_EQ(good(compile(cut(16'384, 1), target)).copies.size(), 16'384U);
  EXPECT_EQ(good(compile(cut(1, 16'384), target)).copies.size(), 16'384U);
  EXPECT_EQ(good(compile(cut(128, 128), target)).bytes, 1ULL << 28U);
}

TEST(Plan, BoxesTooOddToProveDisjointAreRefusedNotEndured) {
  // Goal: a hostile layout costs bounded time. Method: 65,536 shards as a grid of 4 in each of
  // eight dimensions, so that a sweep along any of them keeps a quarter of all open.
  std::vector<TensorSpec> tensors;
  const Dims global(8, 4);
  for (std::uint64_t i = 0; i < 65'536; ++i) {
    Dims offset(8);
    for (std::size_t d = 0; d < 8; ++d) offset[d] = (i >> (2 * d)) & 3U;
    tensors.push_back(
        boxed(tensor("w.rank" + std::to_string(i), Dims(8, 1), i, DType::uint8), global, offset));
  }
  const auto result =
      compile(trainer(tensors, kRanks), engine({tensor("w", global, 0, DType::uint8)}));
  expect_mismatch(result, {{"'w'", "65536 sources", "trainer/dit", "too oddly"}});
}

// ---- what does not fit

TEST(Plan, UnknownNameIsRefusedWithBothSides) {
  expect_mismatch(compile(trainer({tensor("w", {2}), tensor("typo", {3}, 8, DType::bfloat16)}),
                          engine({tensor("w", {2})})),
                  {{"source 'typo' (torch.bfloat16, (3,)) of trainer/dit",
                    "engine/transformer has no tensor", "'typo'"}});
}

TEST(Plan, UnknownNameAfterTheNameMapIsRefusedWithBothNames) {
  expect_mismatch(compile(trainer({tensor("old", {2})}, {{"old", "new"}}), engine({})),
                  {{"'old'", "has no tensor 'new'"}});
}

TEST(Plan, UnmatchedSourcesMayBeAllowed) {
  PlanOptions options;
  options.allow_unmatched = true;
  const Plan sut = good(compile(trainer({tensor("w", {2}), tensor("extra", {2}, 8)}),
                                engine({tensor("w", {2})}), options));
  expect_copies(sut, {{0, 0, 8}});
  EXPECT_TRUE(sut.whole);
}

TEST(Plan, UnmatchedTargetsAreNeverAllowed) {
  PlanOptions options;
  options.allow_unmatched = true;
  expect_mismatch(compile(trainer({}), engine({tensor("w", {2, 3})}), options),
                  {{"target 'w' (torch.float32, (2, 3)) of engine/transformer",
                    "no tensor of trainer/dit maps to it"}});
}

// Goal: of all pairs of dtypes, those with a cast are granted, and every other one is refused by
// both names.
TEST(Plan, OtherDtypeIsCastOrRefused) {
  constexpr DType kAll[] = {
#define REFIT_X(name, number, bytes, text) DType::name,
      REFIT_DTYPE_TABLE(REFIT_X)
#undef REFIT_X
  };
  std::size_t casts = 0;
  for (const DType from : kAll) {
    for (const DType to : kAll) {
      const auto result =
          compile(trainer({tensor("w", {2}, 0, from)}), engine({tensor("w", {2}, 0, to)}));
      if (from == to || cast_between(from, to)) {
        const Plan sut = good(result);
        ASSERT_EQ(sut.copies.size(), 1U);
        EXPECT_EQ(sut.copies[0].cast, *cast_between(from, to));
        EXPECT_EQ(sut.casts.size(), from == to ? 0U : 1U);
        EXPECT_EQ(sut.copies[0].source_run_bytes(), 2 * element_bytes(from));
        EXPECT_EQ(sut.bytes, 2 * element_bytes(to));
        if (from != to) ++casts;
        continue;
      }
      expect_mismatch(result,
                      {{"'w' (" + std::string(dtype_name(to)) + ", (2,)) of engine/transformer",
                        "'w' (" + std::string(dtype_name(from)) + ", (2,)) of trainer/dit",
                        "no cast leads from"}});
    }
  }
  EXPECT_EQ(casts, 6U);
}

TEST(Plan, CastsOfNeighboursAreOneCopyWhereTheyAreTheSameCast) {
  const auto bfloat16 = [](std::string name, std::uint64_t offset) {
    return tensor(std::move(name), {4}, offset, DType::bfloat16);
  };
  expect_copies(good(compile(trainer({tensor("a", {4}), tensor("b", {4}, 16)}),
                             engine({bfloat16("a", 0), bfloat16("b", 8)}))),
                {{0, 0, 16}});
  expect_copies(good(compile(trainer({tensor("a", {4}), tensor("b", {4}, 8, DType::bfloat16)}),
                             engine({bfloat16("a", 0), bfloat16("b", 8)}))),
                {{0, 0, 8}, {8, 8, 8}});
}

// Goal: what a cast reads is counted in the source's bytes. Method: memory that both sides have,
// the target right behind what the source needs, and one byte earlier.
TEST(Plan, CastThatReadsWhatIsWrittenIsRefused) {
  const auto with = [](Role role, TensorSpec spec) {
    return valid(Manifest::validate(role == Role::trainer ? "trainer/dit" : "engine/transformer",
                                    role, {std::move(spec)}, {region(1 << 20, kTrainerInode)}, {}));
  };
  const ManifestPtr source = with(Role::trainer, tensor("w", {4}));
  EXPECT_TRUE(compile(source, with(Role::engine, tensor("w", {4}, 16, DType::bfloat16))));
  expect_mismatch(compile(source, with(Role::engine, tensor("w", {4}, 15, DType::bfloat16))),
                  {{"is the same memory"}});
}

TEST(Plan, OtherShapeIsRefused) {
  expect_mismatch(compile(trainer({tensor("same_bytes", {2, 3}), tensor("rank", {4}, 64),
                                   tensor("scalar", {}, 128), tensor("empty", {0, 2}, 256)}),
                          engine({tensor("same_bytes", {3, 2}), tensor("rank", {2, 2}, 64),
                                  tensor("scalar", {1}, 128), tensor("empty", {2, 0}, 256)})),
                  {{"'same_bytes'", "(3, 2)", "(2, 3)", "another shape"},
                   {"'rank'", "(2, 2)", "(4,)", "another shape"},
                   {"'scalar'", "(1,)", "()", "another shape"},
                   {"'empty'", "(2, 0)", "(0, 2)", "another shape"}});
}

TEST(Plan, OtherGlobalShapeIsRefusedEvenIfTheBoxesAgree) {
  expect_mismatch(compile(trainer({boxed(tensor("w", {2}), {4}, {0})}),
                          engine({boxed(tensor("w", {2}), {6}, {0})})),
                  {{"'w'", "of (6,)", "of (4,)", "another shape"}});
}

TEST(Plan, EverythingWrongIsListedAtOnce) {
  const ManifestPtr source = trainer(
      {tensor("dtype_and_shape", {3}), tensor("unknown", {1}, 16), tensor("a.q", {1}, 20),
       tensor("twice.rank0", {1}, 24), tensor("twice.rank1", {1}, 28), tensor("fine", {1}, 32)},
      {kQkv[0], kRanks[0]});
  const ManifestPtr target =
      engine({tensor("dtype_and_shape", {2}, 0, DType::int32), tensor("unreached", {1}, 16),
              tensor("a.qkv", {3}, 32), tensor("twice", {1}, 64), tensor("fine", {1}, 68)});
  const auto result = compile(source, target);
  expect_mismatch(result, {{"'dtype_and_shape'", "another dtype"},
                           {"'dtype_and_shape'", "another shape"},
                           {"'unknown'"},
                           {"'unreached'"},
                           {"'a.qkv'", "2 of the 3 parts"},
                           {"'twice'", "both write"}});
  EXPECT_NE(result.error().message.find("trainer/dit"), std::string::npos);
  EXPECT_NE(result.error().message.find("engine/transformer"), std::string::npos);
}

// ---- selection

TEST(Plan, SelectionWritesOnlyWhatIsNamed) {
  PlanOptions options;
  options.selection = {"b", "b"};
  const Plan sut =
      good(compile(trainer({tensor("a", {9}), tensor("b", {2}, 64), tensor("x", {1}, 96)}),
                   engine({tensor("a", {2}), tensor("b", {2}, 8), tensor("c", {2}, 16)}), options));
  expect_copies(sut, {{64, 8, 8}});
  EXPECT_EQ(sut.targets, std::vector<std::uint32_t>{1});
  EXPECT_FALSE(sut.whole);
}

TEST(Plan, SelectionOfEverythingIsWhole) {
  PlanOptions options;
  options.selection = {"b", "a"};
  const Plan sut = good(compile(trainer({tensor("a", {2}), tensor("b", {2}, 8)}),
                                engine({tensor("a", {2}), tensor("b", {2}, 8)}), options));
  EXPECT_TRUE(sut.whole);
  EXPECT_EQ(sut.targets, (std::vector<std::uint32_t>{0, 1}));
}

TEST(Plan, SelectedNameThatTheTargetLacksIsRefused) {
  PlanOptions options;
  options.selection = {"a", "gone", "gone", "bad\n"};
  options.allow_unmatched = true;
  expect_mismatch(compile(trainer({tensor("a", {2}), tensor("gone", {2}, 8)}),
                          engine({tensor("a", {2})}), options),
                  {{"selected 'gone'", "engine/transformer has no such tensor", "trainer/dit"},
                   {"selected 'bad\\x0a'"}});
}

TEST(Plan, SelectedTargetWithoutSourceIsRefused) {
  PlanOptions options;
  options.selection = {"b"};
  expect_mismatch(compile(trainer({tensor("a", {2})}),
                          engine({tensor("a", {2}), tensor("b", {2}, 8)}), options),
                  {{"target 'b'", "no tensor of trainer/dit maps to it"}});
}

TEST(Plan, SelectionIsOfTargetNamesSoAFusedTargetTakesAllItsParts) {
  PlanOptions options;
  options.selection = {"a.qkv"};
  const ManifestPtr source =
      trainer({tensor("a.q", {1}), tensor("a.k", {1}, 4), tensor("a.v", {1}, 8)}, kQkv);
  expect_copies(good(compile(source, engine({tensor("a.qkv", {3})}), options)), {{0, 0, 12}});
}

// ---- one memory on both sides

Result<Plan> within_one_memory(std::vector<TensorSpec> source, std::vector<TensorSpec> target,
                               const PlanOptions& options = {}) {
  return compile(valid(Manifest::validate("trainer/dit", Role::trainer, std::move(source),
                                          {region(64, 1), region(4096, 7)}, {})),
                 valid(Manifest::validate("engine/transformer", Role::engine, std::move(target),
                                          {region(4096, 7), region(64, 2)}, {})),
                 options);
}

TEST(Plan, SourceThatIsTheTargetsMemoryIsRefused) {
  expect_mismatch(within_one_memory({in_region(tensor("w", {4}), 1)}, {tensor("w", {4})}),
                  {{"'w' (torch.float32, (4,)) of engine/transformer",
                    "'w' (torch.float32, (4,)) of trainer/dit", "same memory"}});
}

TEST(Plan, SourceThatAnotherTargetOverwritesIsRefused) {
  // Moving both tensors up by half of one: copying b first or a first, one reads what was written.
  expect_mismatch(
      within_one_memory({in_region(tensor("a", {4}, 0), 1), in_region(tensor("b", {4}, 16), 1)},
                        {tensor("a", {4}, 24), tensor("b", {4}, 256)}),
      {{"target 'a'", "source 'b'", "same memory"}});
  expect_mismatch(
      within_one_memory({in_region(tensor("a", {4}, 256), 1), in_region(tensor("b", {4}, 24), 1)},
                        {tensor("a", {4}, 16), tensor("b", {4}, 512)}),
      {{"target 'a'", "source 'b'", "same memory"}});
}

TEST(Plan, SourceAndTargetSideBySideInOneMemoryAreTaken) {
  const Plan sut = good(
      within_one_memory({in_region(tensor("a", {4}, 0), 1), in_region(tensor("b", {4}, 32), 1)},
                        {tensor("a", {4}, 16), tensor("b", {4}, 48)}));
  EXPECT_EQ(sut.copies.size(), 2U);
}

TEST(Plan, EqualOffsetsInDifferentMemoriesAreTaken) {
  EXPECT_TRUE(within_one_memory({tensor("w", {4})}, {tensor("w", {4})}).has_value());
}

TEST(Plan, TargetThatIsNotSelectedMayBeReadFrom) {
  PlanOptions options;
  options.selection = {"a"};
  EXPECT_TRUE(within_one_memory({in_region(tensor("a", {4}, 64), 1)},
                                {tensor("a", {4}, 0), tensor("b", {4}, 64)}, options)
                  .has_value());
}

// ---- size

TEST(Plan, ManifestAtTheLimitCompiles) {
  // 65,536 tensors, in opposite order on both sides, with a rule that matches each.
  constexpr std::uint64_t kCount = 65'536;
  std::vector<TensorSpec> source;
  std::vector<TensorSpec> target;
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const std::string number = std::to_string(i);
    source.push_back(tensor("blocks." + number + ".linear_1.weight", {2}, i * 8));
    target.push_back(tensor("blocks." + number + ".fc_in.weight", {2}, (kCount - 1 - i) * 8));
  }
  const ManifestPtr from = trainer(source, {{"^(.*)\\.linear_1\\.(.*)$", "\\1.fc_in.\\2"}});
  const ManifestPtr to = engine(target);
  const Plan sut = good(compile(from, to));
  EXPECT_EQ(sut.copies.size(), kCount);
  EXPECT_EQ(sut.copies.front().source_offset, (kCount - 1) * 8);
  EXPECT_EQ(sut.bytes, kCount * 8);
}

}  // namespace
}  // namespace refit::daemon
