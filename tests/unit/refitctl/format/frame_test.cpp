// Screenfuls of text: what fits is drawn over what stood there. One thread.
#include "refitctl/format/frame.hpp"

#include <gtest/gtest.h>

namespace refit::ctl {
namespace {

constexpr const char* kBegin = "\x1b[?2026h\x1b[H";
constexpr const char* kEnd = "\x1b[J\x1b[?2026l";

TEST(Frame, LinesOverwriteAndTheRestIsCleared) {
  EXPECT_EQ(frame("one\ntwo\n", {24, 80}), std::string(kBegin) + "one\x1b[K\r\ntwo\x1b[K" + kEnd);
  EXPECT_EQ(frame("", {24, 80}), std::string(kBegin) + kEnd);
}

TEST(Frame, NothingScrolls) {
  // As many line ends as rows less one, however much there is to say.
  const std::string sut = frame("1\n2\n3\n4\n5\n", {3, 80});

  EXPECT_EQ(sut, std::string(kBegin) + "1\x1b[K\r\n2\x1b[K\r\n(3 more lines)\x1b[K" + kEnd);
  EXPECT_EQ(frame("1\n2\n3\n", {3, 80}).find("more"), std::string::npos);
  EXPECT_EQ(frame("1\n2\n", {1, 80}), std::string(kBegin) + "(2 more lines)\x1b[K" + kEnd);
}

TEST(Frame, LinesAreCutAtTheWidth) {
  EXPECT_EQ(crop("abcdef", 4), "abcd");
  EXPECT_EQ(crop("abcd", 4), "abcd");
  EXPECT_EQ(crop("", 4), "");
  EXPECT_EQ(crop("abc", 0), "");
}

TEST(Frame, WideCharactersAreNotHalved) {
  EXPECT_EQ(crop("a\u540d\u524d", 3), "a\u540d");
  EXPECT_EQ(crop("a\u540d\u524d", 4), "a\u540d");
  EXPECT_EQ(crop("a\u540d\u524d", 5), "a\u540d\u524d");
}

TEST(Frame, ColoursTakeNoRoomAndEnd) {
  EXPECT_EQ(crop("\x1b[1mabc\x1b[0m", 2), "\x1b[1mab\x1b[0m");
  EXPECT_EQ(crop("\x1b[1mabc\x1b[0m", 3), "\x1b[1mabc\x1b[0m\x1b[0m");
}

}  // namespace
}  // namespace refit::ctl
