// Which rules apply to an engine, and whom they let in.

#include "server/engine_access.hpp"

#include <gtest/gtest.h>

namespace refit::daemon {
namespace {

const std::vector<EngineRule> kRules{
    {"flux*", std::nullopt, {1000}, {}},
    {"flux", uid_t{7}, {1001}, {50}},
    {"wan[01]", std::nullopt, {}, {60}},
};

TEST(EngineAccess, AddsUpTheRulesOfNameAndOwner) {
  EXPECT_EQ(EngineAccess::of(kRules, 7, "flux").uids, (std::vector<uid_t>{1000, 1001}));
  EXPECT_EQ(EngineAccess::of(kRules, 8, "flux").uids, (std::vector<uid_t>{1000}));
  EXPECT_EQ(EngineAccess::of(kRules, 7, "flux2").uids, (std::vector<uid_t>{1000}));
  EXPECT_EQ(EngineAccess::of(kRules, 7, "wan1").gids, (std::vector<gid_t>{60}));
  EXPECT_TRUE(EngineAccess::of(kRules, 7, "wan2").gids.empty());
  EXPECT_TRUE(EngineAccess::of({}, 7, "flux").uids.empty());
}

TEST(EngineAccess, AdmitsByUidByGroupAndBySupplementaryGroup) {
  const EngineAccess sut = EngineAccess::of(kRules, 7, "flux");
  EXPECT_TRUE(sut.admits({1001, 1, 1, {}}));
  EXPECT_TRUE(sut.admits({1, 50, 1, {}}));
  EXPECT_TRUE(sut.admits({1, 1, 1, {3, 50, 70}}));
  EXPECT_FALSE(sut.admits({50, 1, 1, {3, 1000}}));
}

TEST(EngineAccess, RootIsNoException) {
  EXPECT_FALSE(EngineAccess::of(kRules, 7, "flux").admits({0, 0, 1, {0}}));
  EXPECT_FALSE(EngineAccess{}.admits({0, 0, 1, {0}}));
}

}  // namespace
}  // namespace refit::daemon
