// The name map: full matches, order, rewriting, and patterns that a client should not have sent.
#include "plan/name_map.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace refit::daemon {
namespace {

constexpr std::size_t kPatternBytesMax = 1'024;
constexpr std::size_t kNameBytesMax = 512;

NameMap good(const std::vector<NameRule>& rules) {
  std::vector<std::string> problems;
  NameMap map = NameMap::compile(rules, kPatternBytesMax, problems);
  EXPECT_TRUE(problems.empty()) << problems.front();
  return map;
}

std::string mapped(const NameMap& sut, const std::string& name) {
  const auto result = sut.apply(name, kNameBytesMax);
  return result ? result->name : "(no rule)";
}

std::vector<std::string> problems_of(const NameRule& rule) {
  std::vector<std::string> problems;
  const NameMap sut = NameMap::compile({rule}, kPatternBytesMax, problems);
  EXPECT_FALSE(sut.apply("a", kNameBytesMax).has_value()) << "a broken rule matched";
  return problems;
}

TEST(NameMap, MatchesWholeNamesWithAndWithoutAnchors) {
  const NameMap sut = good({{"^a(\\d+)$", "b\\1"}, {"c(\\d+)", "d\\1"}});
  EXPECT_EQ(mapped(sut, "a12"), "b12");
  EXPECT_EQ(mapped(sut, "a12x"), "(no rule)");
  EXPECT_EQ(mapped(sut, "xa12"), "(no rule)");
  EXPECT_EQ(mapped(sut, "c7"), "d7");
  EXPECT_EQ(mapped(sut, "xc7"), "(no rule)");
  EXPECT_EQ(mapped(sut, "c7\n"), "(no rule)");
}

TEST(NameMap, FirstRuleWinsAndSaysWhichItWas) {
  const NameMap sut = good({{"x.*", "first"}, {"xy", "second"}, {"z", "third"}});
  EXPECT_EQ(mapped(sut, "xy"), "first");
  ASSERT_TRUE(sut.apply("z", kNameBytesMax).has_value());
  EXPECT_EQ(sut.apply("z", kNameBytesMax)->rule, 2U);
}

TEST(NameMap, RewritesGroupsBackslashesAndTheWholeMatch) {
  const NameMap sut = good({{"(a)(b)?(c)", "\\3\\1[\\2]\\\\\\0"}});
  EXPECT_EQ(mapped(sut, "abc"), "ca[b]\\abc");
  EXPECT_EQ(mapped(sut, "ac"), "ca[]\\ac");
}

TEST(NameMap, ManifestStyleFusionRuleMapsWeightAndBias) {
  const NameMap sut = good({{"^(transformer_blocks\\.\\d+\\.attn)\\.add_k_proj\\.(weight|bias)$",
                             "\\1.to_added_qkv.\\2", 1, 3}});
  EXPECT_EQ(mapped(sut, "transformer_blocks.41.attn.add_k_proj.bias"),
            "transformer_blocks.41.attn.to_added_qkv.bias");
  EXPECT_EQ(mapped(sut, "transformer_blocks.x.attn.add_k_proj.bias"), "(no rule)");
}

TEST(NameMap, BrokenRulesAreNamedAndNeverMatch) {
  const auto expect_one = [](const NameRule& rule, const std::string& text) {
    const std::vector<std::string> problems = problems_of(rule);
    ASSERT_EQ(problems.size(), 1U) << text;
    EXPECT_NE(problems[0].find("name rule 0"), std::string::npos) << problems[0];
    EXPECT_NE(problems[0].find(text), std::string::npos) << problems[0];
  };
  expect_one({"a(", "b"}, "does not compile");
  expect_one({"(?=a)a", "b"}, "does not compile");
  expect_one({"a", "\\1"}, "does not fit");
  expect_one({"a", "b\\"}, "does not fit");
  expect_one({"a", "\\x"}, "does not fit");
  expect_one({"a", "b", 3, 3}, "part 3 of 3");
  expect_one({"a", "b", 0, 0}, "part 0 of 0");
  expect_one({"a", ""}, "target is empty");
  expect_one({std::string(1'025, 'a'), "b"}, "1025 bytes, the limit is 1024");
  expect_one({"a", std::string(1'025, 'b')}, "1025 bytes, the limit is 1024");
}

TEST(NameMap, EveryProblemOfARuleIsListed) { EXPECT_EQ(problems_of({"a(", "", 2, 1}).size(), 3U); }

TEST(NameMap, PatternsWithHugeProgramsAreRefused) {
  ASSERT_EQ(problems_of({"((((a{10}){10}){10}){10})", "b"}).size(), 1U);
  // RE2's own default would take this one.
  ASSERT_EQ(problems_of({"(\\pL{10}){2}", "b"}).size(), 1U);
}

TEST(NameMap, DeepNestingIsRefusedWithoutCrashing) {
  const std::string deep = std::string(500, '(') + "a" + std::string(500, ')');
  std::vector<std::string> problems;
  const NameMap sut = NameMap::compile({{deep, "b"}}, kPatternBytesMax, problems);
  // RE2 may take this or not; either way the answer is a rule or a problem.
  EXPECT_EQ(sut.apply("a", kNameBytesMax).has_value(), problems.empty());
}

TEST(NameMap, PatternOfExponentialBacktrackingIsLinear) {
  const NameMap sut = good({{"(a*)*(a*)*(a*)*b", "x"}});
  EXPECT_EQ(mapped(sut, std::string(512, 'a')), "(no rule)");
}

TEST(NameMap, ResultThatGrowsWithoutBoundIsCutBehindTheLimit) {
  std::string bomb;
  for (int i = 0; i < 500; ++i) bomb += "\\0";
  const NameMap sut = good({{".*", bomb}});
  const auto result = sut.apply(std::string(512, 'a'), kNameBytesMax);
  ASSERT_TRUE(result.has_value());
  EXPECT_EQ(result->name.size(), kNameBytesMax + 1);
}

TEST(NameMap, WorkCountsThePrograms) {
  EXPECT_EQ(good({}).work_per_byte(), 0U);
  const std::uint64_t one = good({{"^abc$", "x"}}).work_per_byte();
  EXPECT_GT(one, 3U);
  EXPECT_EQ(good({{"^abc$", "x"}, {"^abc$", "y"}}).work_per_byte(), 2 * one);
}

}  // namespace
}  // namespace refit::daemon
