// ENGINE/MODULE as a person types it. One thread.
#include "refitctl/target.hpp"

#include <gtest/gtest.h>

namespace refit::ctl {
namespace {

TEST(Target, SplitsAtTheFirstSlash) {
  const auto sut = parse_target("engine0/transformer/blocks");

  ASSERT_TRUE(sut);
  EXPECT_EQ(sut->engine, "engine0");
  EXPECT_EQ(sut->module, "transformer/blocks");
  EXPECT_EQ(sut->to_string(), "engine0/transformer/blocks");
}

TEST(Target, MissingPartIsRefusedWithTheFormWanted) {
  for (const char* text : {"", "engine0", "/transformer", "engine0/", "/"}) {
    const auto sut = parse_target(text);

    ASSERT_FALSE(sut) << text;
    EXPECT_EQ(sut.error().code, Errc::bad_argument);
    EXPECT_NE(sut.error().message.find("\"" + std::string(text) + "\""), std::string::npos);
    EXPECT_NE(sut.error().message.find("ENGINE/MODULE"), std::string::npos);
  }
}

}  // namespace
}  // namespace refit::ctl
