// Aligned columns. One thread.
#include "refitctl/format/table.hpp"

#include <gtest/gtest.h>

namespace refit::ctl {
namespace {

TEST(Table, ColumnsAreAlignedAndNoLineEndsInSpaces) {
  Table sut({{"NAME"}, {"SIZE", Align::right}, {"STATE"}});
  sut.add_row({std::string("a"), std::string("1"), std::string("committed")});
  sut.add_row({std::string("longer"), std::string("12345"), std::string("ok")});

  EXPECT_EQ(sut.render(Style{}),
            "NAME     SIZE  STATE\n"
            "a           1  committed\n"
            "longer  12345  ok\n");
}

TEST(Table, IndentStandsBeforeEveryLine) {
  Table sut({{"A"}});
  sut.add_row({std::string("x")});

  EXPECT_EQ(sut.render(Style{}, 2), "  A\n  x\n");
}

TEST(Table, EmptyAndMissingCellsAreDashes) {
  Table sut({{"A"}, {"B"}, {"C"}});
  sut.add_row({std::string(""), std::string("b")});

  EXPECT_EQ(sut.render(Style{}),
            "A  B  C\n"
            "-  b  -\n");
}

TEST(Table, CellsCannotBreakTheTable) {
  Table sut({{"A"}, {"B"}});
  sut.add_row({std::string("x\ny\x1b[2J"), std::string("b")});

  EXPECT_EQ(sut.render(Style{}),
            "A            B\n"
            "x\\ny\\x1b[2J  b\n");
}

TEST(Table, WideCharactersAndPaintTakeNoPartInTheWidth) {
  Table sut({{"A"}, {"B"}});
  sut.add_row({{"重み", Paint::none}, {"1"}});
  sut.add_row({{"abcd", Paint::bad}, {"2"}});

  EXPECT_EQ(sut.render(Style{}),
            "A     B\n"
            "重み  1\n"
            "abcd  2\n");
  EXPECT_NE(sut.render(Style{true}).find("\x1b[1;31mabcd\x1b[0m  2\n"), std::string::npos);
}

}  // namespace
}  // namespace refit::ctl
