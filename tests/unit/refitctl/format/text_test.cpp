// Foreign text made safe for a terminal. One thread.
#include "refitctl/format/text.hpp"

#include <gtest/gtest.h>

#include <set>

namespace refit::ctl {
namespace {

TEST(Text, PlainNamesStayAsTheyAre) {
  EXPECT_EQ(escape("blocks.0.attn.to_q.weight"), "blocks.0.attn.to_q.weight");
  EXPECT_EQ(escape("größe 重み 🙂"), "größe 重み 🙂");
  EXPECT_EQ(escape(""), "");
}

TEST(Text, ControlCharactersAreWrittenOut) {
  EXPECT_EQ(escape("a\nb\tc\rd"), "a\\nb\\tc\\rd");
  EXPECT_EQ(escape("\x1b[31mred"), "\\x1b[31mred");
  EXPECT_EQ(escape(std::string_view("nul\0del\x7f", 8)), "nul\\x00del\\x7f");
  // U+009B begins a control sequence on terminals that take C1.
  EXPECT_EQ(escape("\xc2\x9b"
                   "2J"),
            "\\u{9b}2J");
}

TEST(Text, CharactersThatHideOrReorderAreWrittenOut) {
  EXPECT_EQ(escape("a\u202eb"), "a\\u{202e}b");
  EXPECT_EQ(escape("a\u200bb"), "a\\u{200b}b");
  EXPECT_EQ(escape("\ufeffx"), "\\u{feff}x");
}

TEST(Text, BytesThatAreNoUtf8AreWrittenOutOneByOne) {
  EXPECT_EQ(escape("\xff"), "\\xff");
  EXPECT_EQ(escape("a\xc3"), "a\\xc3");                           // cut off
  EXPECT_EQ(escape("\xc0\xaf"), "\\xc0\\xaf");                    // overlong slash
  EXPECT_EQ(escape("\xe0\x80\xaf"), "\\xe0\\x80\\xaf");           // overlong, three bytes
  EXPECT_EQ(escape("\xed\xa0\x80"), "\\xed\\xa0\\x80");           // surrogate
  EXPECT_EQ(escape("\xf4\x90\x80\x80"), "\\xf4\\x90\\x80\\x80");  // beyond Unicode
  EXPECT_EQ(escape("\xe9\x87z"), "\\xe9\\x87z");                  // the z is kept
}

TEST(Text, DifferentNamesStayDifferent) {
  // Goal: no name can be spelled so that it is shown as another. Method: names next to the escapes
  // of each other.
  const std::set<std::string> names{"a\n",   "a\\n",   "a\\\\n",   "\x1b",
                                    "\\x1b", "\u202e", "\\u{202e}"};
  std::set<std::string> shown;

  for (const std::string& name : names) shown.insert(escape(name));

  EXPECT_EQ(shown.size(), names.size());
}

TEST(Text, WidthCountsTerminalColumns) {
  EXPECT_EQ(display_width(""), 0U);
  EXPECT_EQ(display_width("abc"), 3U);
  EXPECT_EQ(display_width("größe"), 5U);
  EXPECT_EQ(display_width("重み"), 4U);
  EXPECT_EQ(display_width("e\u0301"), 1U);
}

TEST(Text, Utf8IsToldFromOtherBytes) {
  EXPECT_TRUE(is_utf8(""));
  EXPECT_TRUE(is_utf8("größe\n🙂"));
  EXPECT_FALSE(is_utf8("a\xff"));
  EXPECT_FALSE(is_utf8("\xed\xa0\x80"));
}

}  // namespace
}  // namespace refit::ctl
