// Manifest::validate: every kind of problem, complete lists, hostile numbers. One thread; pure, so
// no files and no sockets.
#include "plan/manifest.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "plan_support.hpp"

namespace refit::daemon {
namespace {

using namespace testing;  // NOLINT: the tests read as sentences only without the prefix.

constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();

void expect_bad(const Result<ManifestPtr>& result,
                const std::vector<std::vector<std::string>>& expected) {
  expect_problems(result, Errc::bad_manifest, expected);
}

TEST(Manifest, FillsInStridesAndBoxOfAContiguousWholeTensor) {
  const ManifestPtr sut = engine({tensor("w", {2, 3, 4})});
  const TensorSpec& spec = sut->tensors()[0];
  EXPECT_EQ(spec.strides, (Dims{12, 4, 1}));
  EXPECT_EQ(spec.global_shape, (Dims{2, 3, 4}));
  EXPECT_EQ(spec.box_offset, (Dims{0, 0, 0}));
  EXPECT_EQ(sut->bytes(), 96U);
  EXPECT_EQ(sut->label(), "engine/transformer");
}

TEST(Manifest, KeepsStridesAndBoxThatTheClientGave) {
  const ManifestPtr sut = engine({boxed(strided(tensor("w", {2, 3}), {1, 2}), {4, 3}, {2, 0})});
  EXPECT_EQ(sut->tensors()[0].strides, (Dims{1, 2}));
  EXPECT_EQ(sut->tensors()[0].global_shape, (Dims{4, 3}));
  EXPECT_EQ(sut->tensors()[0].box_offset, (Dims{2, 0}));
}

TEST(Manifest, FindsTensorsByNameOnly) {
  const ManifestPtr sut = engine({tensor("b", {1}), tensor("a", {1}, 4), tensor("ab", {1}, 8)});
  ASSERT_NE(sut->find("a"), nullptr);
  EXPECT_EQ(sut->find("a")->offset_bytes, 4U);
  EXPECT_EQ(sut->find("ab")->offset_bytes, 8U);
  EXPECT_EQ(sut->find("b")->offset_bytes, 0U);
  EXPECT_EQ(sut->find(""), nullptr);
  EXPECT_EQ(sut->find("c"), nullptr);
  EXPECT_EQ(sut->find("aa"), nullptr);
}

TEST(Manifest, ScalarHasOneElementAndMustFit) {
  EXPECT_EQ(engine({tensor("scale", {}, 4)}, 8)->bytes(), 4U);
  expect_bad(try_engine({tensor("scale", {}, 5)}, 8), {{"'scale'", "byte 9", "8 bytes"}});
}

TEST(Manifest, EmptyTensorHasNoBytesAndMayStandAtTheEnd) {
  const ManifestPtr sut = engine(
      {tensor("none", {0}, 8), tensor("huge", {kHuge, 0, kHuge}, 8), tensor("full", {2})}, 8);
  EXPECT_EQ(sut->bytes(), 8U);
  expect_bad(try_engine({tensor("none", {0}, 9)}, 8), {{"'none'", "byte 9", "8 bytes"}});
}

TEST(Manifest, NoTensorsAtAllAreAManifest) {
  EXPECT_EQ(valid(Manifest::validate("t/m", Role::trainer, {}, {}, {}))->bytes(), 0U);
}

TEST(Manifest, IllegalNamesAreListedAndEscaped) {
  const std::string nul("a\0b", 3);
  expect_bad(try_trainer({tensor("", {1}), tensor("line\nbreak", {1}), tensor(nul, {1}),
                          tensor("\xff", {1}), tensor("\xc0\xaf", {1}),
                          tensor("\xc2\x9b"
                                 "31m",
                                 {1}),
                          tensor("tab\x7f", {1}), tensor(std::string(513, 'n'), {1}),
                          tensor(std::string(512, 'n'), {1}),
                          tensor("gr\xc3\xb6\xc3\x9f"
                                 "e",
                                 {1})}),
             {{"number 0", "empty"},
              {"'line\\x0abreak'", "control"},
              {"'a\\x00b'", "control"},
              {"'\\xff'", "UTF-8"},
              {"'\\xc0\\xaf'", "UTF-8"},
              {"31m", "control"},
              {"'tab\\x7f'", "control"},
              {"513 bytes", "limit is 512"}});
}

TEST(Manifest, NamesAreUtf8InItsOnlySpelling) {
  for (const char* name : {"\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                           "\xf5\x80\x80\x80", "\x80", "\xe2\x82", "\xe2\x28\xa1"}) {
    expect_bad(try_trainer({tensor(name, {1})}), {{"not UTF-8"}});
  }
  EXPECT_TRUE(try_trainer({tensor("\xe2\x82\xac", {1}), tensor("\xf0\x9f\x98\x80", {1}),
                           tensor("\xf4\x8f\xbf\xbf", {1}), tensor("\xc2\xa0", {1})})
                  .has_value());
}

TEST(Manifest, DuplicateNamesAreOneLineForEachName) {
  expect_bad(try_trainer({tensor("a", {1}), tensor("b", {1}), tensor("a", {1}), tensor("b", {1}),
                          tensor("a", {1}), tensor("c", {1})}),
             {{"'a'", "3 tensors", "0 and 2"}, {"'b'", "2 tensors", "1 and 3"}});
}

TEST(Manifest, EveryByteThatIsNoDtypeIsRefused) {
  for (int number = 0; number < 256; ++number) {
    const auto dtype = static_cast<DType>(number);
    const auto result = try_engine({tensor("w", {1}, 0, dtype)});
    if (number >= 1 && number <= 12) {
      EXPECT_TRUE(result.has_value()) << number;
    } else {
      expect_bad(result, {{"'w'", "dtype number " + std::to_string(number) + " "}});
    }
  }
}

TEST(Manifest, ByteCountsThatOverflowAreRefused) {
  expect_bad(
      try_trainer({tensor("elements", {kHuge, 2}), tensor("bytes", {kHuge}),
                   tensor("product", {1ULL << 32, 1ULL << 32}), tensor("just", {1ULL << 62})}),
      {{"'elements'", "overflow"},
       {"'bytes'", "overflow"},
       {"'product'", "overflow"},
       {"'just'", "overflow"}});
}

TEST(Manifest, StridesAndOffsetsThatLeaveTheRegionAreRefused) {
  expect_bad(
      try_trainer(
          {tensor("inside", {4}, 48), tensor("offset", {4}, 52), tensor("far", {1}, kHuge),
           tensor("wraps", {4}, kHuge - 15), strided(tensor("stride", {2, 2}), {15, 1}),
           strided(tensor("stride_wraps", {3, 2}), {1ULL << 63, 1}),
           strided(tensor("sum_wraps", {2, 2}), {kHuge, 1}),
           strided(tensor("unused", {1, 2}), {kHuge, 1}), strided(tensor("fits", {2, 2}), {14, 1})},
          {}, 64),
      {{"'offset'", "byte 68", "64 bytes"},
       {"'far'", "beyond 64 bits"},
       {"'wraps'", "beyond 64 bits"},
       {"'stride'", "byte 68"},
       {"'stride_wraps'", "beyond 64 bits"},
       {"'sum_wraps'", "beyond 64 bits"}});
}

TEST(Manifest, StridesMustBeAsManyAsDimensions) {
  expect_bad(try_trainer({strided(tensor("w", {2, 2}), {1}), strided(tensor("s", {}), {1})}),
             {{"'w'", "1 strides for 2 dimensions"}, {"'s'", "1 strides for 0 dimensions"}});
}

TEST(Manifest, RegionMustExist) {
  expect_bad(try_engine({in_region(tensor("w", {1}), 1), in_region(tensor("x", {1}), 0xffffffffU)}),
             {{"'w'", "region 1 does not exist"}, {"'x'", "region 4294967295"}});
}

TEST(Manifest, BoxMustLieInItsGlobalShape) {
  expect_bad(
      try_trainer({boxed(tensor("ok", {2, 3}), {4, 3}, {2, 0}),
                   boxed(tensor("out", {2, 3}), {4, 3}, {3, 0}),
                   boxed(tensor("wraps", {2, 3}), {4, 3}, {kHuge, 0}),
                   boxed(tensor("rank", {2, 3}), {4}, {0}), boxed(tensor("half", {2}), {4}, {}),
                   boxed(tensor("global", {2, 2}), {kHuge, kHuge}, {0, 0}),
                   boxed(tensor("global_bytes", {2}), {1ULL << 62}, {0})}),
      {{"'out'", "dimension 0", "(4, 3)"},
       {"'wraps'", "dimension 0"},
       {"'rank'", "1 offsets and 1 global extents for 2 dimensions"},
       {"'half'", "0 offsets and 1 global"},
       {"'global'", "overflow"},
       {"'global_bytes'", "overflow"}});
}

TEST(Manifest, DimensionsAreLimited) {
  EXPECT_TRUE(try_engine({tensor("w", Dims(8, 1))}).has_value());
  expect_bad(try_engine({tensor("w", Dims(9, 1))}), {{"'w'", "9 dimensions", "limit is 8"}});
  ManifestLimits limits;
  limits.dims_max = 100;
  expect_bad(Manifest::validate("e/m", Role::engine, {tensor("w", Dims(9, 1))}, {region(64, 1)}, {},
                                limits),
             {{"'w'", "limit is 8"}});
}

TEST(Manifest, CountsOverTheLimitsAreRefusedTogether) {
  ManifestLimits limits;
  limits.tensors_max = 1;
  limits.regions_max = 1;
  limits.name_rules_max = 1;
  expect_bad(Manifest::validate("t/m", Role::trainer, {tensor("a", {1}), tensor("b", {1})},
                                {region(64, 1), region(64, 2)}, {{"a", "b"}, {"c", "d"}}, limits),
             {{"2 tensors", "limit is 1"}, {"2 regions", "limit is 1"}, {"2 name rules", "limit"}});
}

TEST(Manifest, SumOfBytesThatOverflowsIsRefused) {
  // Expanded tensors have many elements in few bytes, so their sum alone can overflow.
  std::vector<TensorSpec> tensors;
  for (int i = 0; i < 4; ++i) {
    tensors.push_back(strided(tensor("e" + std::to_string(i), {1ULL << 60}), {0}));
  }
  expect_bad(try_trainer(tensors), {{"manifest", "together overflow"}});
  tensors.pop_back();
  EXPECT_EQ(trainer(tensors)->bytes(), 3ULL << 62U);
}

TEST(Manifest, AllProblemsOfAllTensorsComeAtOnce) {
  TensorSpec worst = tensor("worst", {2, 2}, 0, static_cast<DType>(99));
  worst.region = 7;
  worst.strides = {1};
  worst.global_shape = {1, 1};
  worst.box_offset = {0, 0};
  expect_bad(try_engine({worst, tensor("good", {1}), tensor("late", {64}, 0)}, 64),
             {{"'worst'", "dtype"},
              {"'worst'", "region 7"},
              {"'worst'", "strides"},
              {"'worst'", "global shape"},
              {"'late'", "byte 256"}});
}

// ---- an engine's tensors

TEST(Manifest, TargetThatOverlapsItselfIsRefusedAndSourceIsNot) {
  const std::vector<TensorSpec> tensors = {strided(tensor("expanded", {4, 2}), {0, 1}),
                                           strided(tensor("window", {3, 3}, 64), {1, 1})};
  EXPECT_TRUE(try_trainer(tensors).has_value());
  expect_bad(try_engine(tensors), {{"'expanded'", "overlap itself", "(0, 1)"},
                                   {"'window'", "overlap itself", "(1, 1)"}});
}

TEST(Manifest, TransposedAndPaddedTargetsAreTaken) {
  EXPECT_TRUE(try_engine({strided(tensor("transposed", {3, 4}), {1, 3}),
                          strided(tensor("padded", {3, 4}, 64), {8, 1}),
                          strided(tensor("one", {1, 4}, 256), {0, 1})})
                  .has_value());
}

TEST(Manifest, OverlappingTargetsAreRefusedNamingBothAndSourcesAreNot) {
  const std::vector<TensorSpec> tensors = {tensor("a", {4}), tensor("b", {4}, 12),
                                           tensor("c", {4}, 28), tensor("d", {2}, 64)};
  EXPECT_TRUE(try_trainer(tensors).has_value());
  expect_bad(try_engine(tensors), {{"'a' and tensor 'b'", "they overlap", "offset 12"}});
}

TEST(Manifest, EqualTargetsAreRefused) {
  expect_bad(try_engine({tensor("a", {4}), tensor("tied", {4})}), {{"'a' and tensor 'tied'"}});
}

TEST(Manifest, EmptyTargetOverlapsNothing) {
  EXPECT_TRUE(try_engine({tensor("a", {4}), tensor("none", {0, 3}, 4)}).has_value());
}

TEST(Manifest, TwoRegionsOfOneIdentityAreOneMemory) {
  const std::vector<TensorSpec> tensors = {in_region(tensor("a", {4}), 0),
                                           in_region(tensor("b", {4}, 8), 1)};
  const auto with = [&](RegionInfo first, RegionInfo second) {
    return Manifest::validate("e/m", Role::engine, tensors, {first, second}, {});
  };
  expect_bad(with({64, 1, 5}, {32, 1, 5}), {{"'a' and tensor 'b'", "region 0", "region 1"}});
  EXPECT_TRUE(with({64, 1, 5}, {64, 1, 6}).has_value());
  EXPECT_TRUE(with({64, 1, 5}, {64, 2, 5}).has_value());
}

TEST(Manifest, ColumnsOfOneMatrixAreApart) {
  // Six columns wide rows of 40 bytes, the matrix at an odd place, split into columns and rows.
  const std::uint64_t base = 13 * 4;
  EXPECT_TRUE(try_engine({strided(tensor("left", {4, 3}, base), {10, 1}),
                          strided(tensor("right_top", {2, 7}, base + 12), {10, 1}),
                          strided(tensor("right_bottom", {2, 7}, base + 12 + 80), {10, 1})})
                  .has_value());
  expect_bad(try_engine({strided(tensor("left", {4, 4}, base), {10, 1}),
                         strided(tensor("right", {4, 7}, base + 12), {10, 1})}),
             {{"'left' and tensor 'right'", "interleave"}});
}

TEST(Manifest, EvenAndOddElementsAreApart) {
  EXPECT_TRUE(try_engine({strided(tensor("even", {8}), {2}), strided(tensor("odd", {8}, 4), {2})})
                  .has_value());
  expect_bad(try_engine({strided(tensor("even", {8}), {2}), strided(tensor("also", {8}, 8), {2})}),
             {{"'even' and tensor 'also'", "interleave"}});
}

TEST(Manifest, DenseTensorInsideAStridedOneIsRefused) {
  expect_bad(try_engine({strided(tensor("comb", {4}), {4}), tensor("block", {8}, 8)}),
             {{"'comb' and tensor 'block'", "interleave"}});
}

TEST(Manifest, RandomTargetsAreAcceptedOnlyIfNoByteIsShared) {
  // Goal: no overlapping pair is ever accepted, and no contiguous manifest refused for nothing.
  // Method: a few small strided tensors in 256 bytes, against a map of who owns each byte.
  std::size_t accepted = 0;
  std::size_t accepted_strided_cluster = 0;
  for (std::uint32_t seed = 0; seed < 10'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937 random(seed);
    const auto pick = [&](std::uint64_t first, std::uint64_t last) {
      return std::uniform_int_distribution<std::uint64_t>(first, last)(random);
    };
    std::vector<TensorSpec> tensors;
    const bool contiguous = pick(0, 3) == 0;
    const std::uint64_t row = pick(2, 12);
    for (std::uint64_t i = 0, count = pick(1, 4); i < count; ++i) {
      const DType dtype = pick(0, 1) == 0 ? DType::uint8 : DType::float16;
      TensorSpec spec =
          tensor("t" + std::to_string(i), {pick(1, 4), pick(1, 4)}, pick(0, 60), dtype);
      if (!contiguous) {
        spec.strides = pick(0, 2) == 0 ? Dims{pick(0, 12), pick(0, 12)} : Dims{row, 1};
      }
      tensors.push_back(spec);
    }
    std::vector<int> owner(256, -1);
    bool shared = false;
    for (std::size_t t = 0; t < tensors.size(); ++t) {
      const TensorSpec& spec = tensors[t];
      const std::uint64_t element = element_bytes(spec.dtype);
      const Dims strides = spec.strides.empty() ? Dims{spec.shape[1], 1} : spec.strides;
      for (std::uint64_t i = 0; i < spec.shape[0]; ++i) {
        for (std::uint64_t j = 0; j < spec.shape[1]; ++j) {
          for (std::uint64_t b = 0; b < element; ++b) {
            int& byte = owner[spec.offset_bytes + (i * strides[0] + j * strides[1]) * element + b];
            if (byte >= 0) shared = true;
            byte = static_cast<int>(t);
          }
        }
      }
    }
    const auto result = try_engine(tensors, 256);
    if (result) {
      ASSERT_FALSE(shared);
      ++accepted;
      if (!contiguous && tensors.size() > 1) ++accepted_strided_cluster;
    } else if (contiguous) {
      ASSERT_TRUE(shared) << result.error().to_string();
    }
  }
  EXPECT_GT(accepted, 500U);
  EXPECT_GT(accepted_strided_cluster, 250U);
}

TEST(Manifest, ManyTensorsAtTheLimitAreTakenInEveryArrangement) {
  // Goal: no step is quadratic in the number of tensors. Method: the arrangements that would be, at
  // the full count; a quadratic step takes minutes here, which the runner's timeout would see.
  constexpr std::uint64_t kCount = 65'536;
  std::vector<TensorSpec> packed;
  std::vector<TensorSpec> columns;
  std::vector<TensorSpec> same;
  std::vector<TensorSpec> nested;
  for (std::uint64_t i = 0; i < kCount; ++i) {
    const std::string name = std::string(60, 'x') + std::to_string(i);
    packed.push_back(tensor(name, {2, 2}, i * 16));
    columns.push_back(strided(tensor(name, {4, 1}, i * 4), {kCount, 1}));
    same.push_back(tensor(name, {4}));
    nested.push_back(tensor(name, {kCount - i}, i * 4));
  }
  EXPECT_EQ(engine(packed)->bytes(), kCount * 16);
  EXPECT_EQ(engine(columns)->bytes(), kCount * 16);
  const auto all_same = try_engine(same);
  ASSERT_FALSE(all_same.has_value());
  EXPECT_EQ(all_same.error().details.size(), kCount - 1);
  const auto all_nested = try_engine(nested);
  ASSERT_FALSE(all_nested.has_value());
  EXPECT_EQ(all_nested.error().details.size(), kCount - 1);
}

// ---- name rules within a manifest

TEST(Manifest, DestinationsFollowTheFirstRuleThatMatches) {
  const ManifestPtr sut = trainer({tensor("a.q", {1}), tensor("a.k", {1}), tensor("other", {1})},
                                  {{"^(.*)\\.q$", "\\1.qkv", 0, 3},
                                   {"^(.*)\\.[qk]$", "\\1.qkv", 1, 3},
                                   {"^a\\.(.*)$", "never.\\1"}});
  EXPECT_EQ(sut->destination(0).name, "a.qkv");
  EXPECT_EQ(sut->destination(0).part, 0U);
  EXPECT_EQ(sut->destination(1).part, 1U);
  EXPECT_EQ(sut->destination(1).parts, 3U);
  EXPECT_EQ(sut->destination(2).name, "other");
  EXPECT_EQ(sut->destination(2).parts, 1U);
}

TEST(Manifest, WithoutRulesEveryTensorKeepsItsName) {
  EXPECT_EQ(trainer({tensor("a", {1})})->destination(0).name, "a");
}

TEST(Manifest, RulesThatDoNotCompileAreListedWithTheRest) {
  expect_bad(try_trainer({tensor("w", {1}, kHuge)},
                         {{"(", "x"}, {"a", "\\1"}, {"b", "c", 2, 2}, {"d", "e", 0, 0}, {"f", ""}}),
             {{"'w'", "64 bits"},
              {"name rule 0 '('", "does not compile"},
              {"name rule 1 'a'", "does not fit"},
              {"name rule 2 'b'", "part 2 of 2"},
              {"name rule 3 'd'", "part 0 of 0"},
              {"name rule 4 'f'", "target is empty"}});
}

TEST(Manifest, NamesThatARuleMakesIllegalAreRefused) {
  std::string bomb;
  for (int i = 0; i < 500; ++i) bomb += "\\0";
  expect_bad(try_trainer({tensor("empty", {1}), tensor("long", {1}), tensor("fine", {1})},
                         {{"(x?)empty", "\\1"}, {"long", bomb}}),
             {{"'empty'", "name rule 0", "empty"}, {"'long'", "name rule 1", "more than 512"}});
}

TEST(Manifest, RulesTooCostlyForTheNamesAreRefused) {
  std::vector<TensorSpec> tensors;
  for (int i = 0; i < 20'000; ++i) {
    tensors.push_back(tensor(std::string(400, 'a') + std::to_string(i), {1}));
  }
  std::vector<NameRule> rules(64, {"(a*.*){4}(a|b)*[a-z]{100}z", "\\0"});
  expect_bad(try_trainer(tensors, rules), {{"manifest", "too costly"}});
}

TEST(Manifest, RandomHostileSpecsNeverBreakAnything) {
  // Goal: no overflow, no access out of bounds, no crash, whatever the numbers are; the sanitizers
  // watch. What is accepted must lie inside its region by 128-bit arithmetic.
  __extension__ using Wide = unsigned __int128;
  std::size_t accepted = 0;
  for (std::uint32_t seed = 0; seed < 10'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    std::mt19937_64 random(seed);
    const auto value = [&]() -> std::uint64_t {
      switch (random() % 6) {
        case 0:
          return random() % 3;
        case 1:
          return random() % 9;
        case 2:
          return 1ULL << (random() % 64);
        case 3:
          return kHuge - random() % 3;
        case 4:
          return (1ULL << (random() % 64)) - 1;
        default:
          return random() % 4;
      }
    };
    const auto dims = [&](std::size_t count) {
      Dims list(random() % 16 == 0 ? random() % 11 : count);
      for (std::uint64_t& entry : list) entry = value();
      return list;
    };
    std::vector<TensorSpec> tensors(random() % 4 + 1);
    for (TensorSpec& spec : tensors) {
      const std::size_t count = random() % 4;
      spec.name = std::string(random() % 3 + 1, static_cast<char>('a' + random() % 26));
      spec.dtype = static_cast<DType>(random() % 13);
      spec.shape = dims(count);
      if (random() % 2 == 0) spec.strides = dims(count);
      if (random() % 4 == 0) spec.global_shape = dims(count);
      if (!spec.global_shape.empty()) spec.box_offset = dims(count);
      spec.region = static_cast<std::uint32_t>(random() % 3);
      spec.offset_bytes = value();
    }
    const std::vector<RegionInfo> regions = {{value(), 1, 1}, {kHuge, 1, random() % 2}};
    const Role role = random() % 2 == 0 ? Role::engine : Role::trainer;
    const auto result = Manifest::validate("x/y", role, tensors, regions, {});
    if (!result) {
      EXPECT_FALSE(result.error().details.empty());
      continue;
    }
    ++accepted;
    for (const TensorSpec& spec : (*result)->tensors()) {
      Wide end = 1;
      bool empty = false;
      for (std::size_t d = 0; d < spec.shape.size(); ++d) {
        if (spec.shape[d] == 0) {
          empty = true;
          continue;
        }
        end += Wide{spec.shape[d] - 1} * spec.strides[d];
      }
      end = empty ? 0 : end * element_bytes(spec.dtype);
      ASSERT_TRUE(end + spec.offset_bytes <= regions[spec.region].bytes);
    }
  }
  EXPECT_GT(accepted, 500U);
}

}  // namespace
}  // namespace refit::daemon
