// A table of aligned columns for a person.
//
// Pure; one thread at a time per table. Escapes every cell itself, so that no caller can forget to.
// Knows nothing of what the cells mean.
#pragma once

#include <string>
#include <vector>

#include "refitctl/format/style.hpp"

namespace refit::ctl {

enum class Align { left, right };

struct Column {
  std::string title;
  Align align = Align::left;
};

struct Cell {
  Cell(std::string cell_text,
       Paint cell_paint = Paint::none)  // NOLINT(google-explicit-constructor): rows read as lists
      : text(std::move(cell_text)), paint(cell_paint) {}

  std::string text;
  Paint paint;
};

class Table {
 public:
  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  /// Missing cells and empty ones are shown as "-"; cells beyond the last column are dropped.
  void add_row(std::vector<Cell> cells);

  /// Titles and rows, each line ended, no line with trailing spaces; two spaces between columns.
  [[nodiscard]] std::string render(const Style& style, std::size_t indent = 0) const;

 private:
  std::vector<Column> columns_;
  std::vector<std::vector<Cell>> rows_;  ///< escaped, as many cells as columns
};

}  // namespace refit::ctl
