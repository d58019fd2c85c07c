// When refitctl colours and when it does not. One thread.
#include "refitctl/format/style.hpp"

#include <gtest/gtest.h>

namespace refit::ctl {
namespace {

TEST(Style, ColoursAreForTerminalsThatKnowThem) {
  EXPECT_TRUE(colour_wanted(true, nullptr, "xterm-256color"));
  EXPECT_FALSE(colour_wanted(false, nullptr, "xterm-256color"));
  EXPECT_FALSE(colour_wanted(true, nullptr, "dumb"));
  EXPECT_FALSE(colour_wanted(true, nullptr, ""));
  EXPECT_FALSE(colour_wanted(true, nullptr, nullptr));
}

TEST(Style, NoColorTurnsThemOffUnlessEmpty) {
  EXPECT_FALSE(colour_wanted(true, "1", "xterm"));
  EXPECT_FALSE(colour_wanted(true, "0", "xterm"));
  EXPECT_TRUE(colour_wanted(true, "", "xterm"));
}

TEST(Style, PaintIsOnlyAddedWithColour) {
  EXPECT_EQ(Style{false}.paint(Paint::bad, "poisoned"), "poisoned");
  EXPECT_EQ(Style{true}.paint(Paint::none, "plain"), "plain");
  EXPECT_EQ(Style{true}.paint(Paint::good, "ok"), "\x1b[32mok\x1b[0m");
}

}  // namespace
}  // namespace refit::ctl
