// A table of aligned columns. Pure; one thread at a time per table. Knows nothing of what the cells
// mean.
#include "refitctl/format/table.hpp"

#include <algorithm>

#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

constexpr std::size_t kGap = 2;

}  // namespace

void Table::add_row(std::vector<Cell> cells) {
  cells.resize(columns_.size(), Cell(""));
  for (Cell& cell : cells) cell.text = cell.text.empty() ? "-" : escape(cell.text);
  rows_.push_back(std::move(cells));
}

std::string Table::render(const Style& style, std::size_t indent) const {
  std::vector<std::size_t> widths;
  for (std::size_t i = 0; i < columns_.size(); ++i) {
    std::size_t width = display_width(columns_[i].title);
    for (const auto& row : rows_) width = std::max(width, display_width(row[i].text));
    widths.push_back(width);
  }

  std::string out;
  const auto add_cell = [&](std::size_t i, const std::string& text, Paint paint) {
    const std::string padding(widths[i] - display_width(text), ' ');
    const bool last = i + 1 == columns_.size();
    if (columns_[i].align == Align::right) out += padding;
    out += style.paint(paint, text);
    if (columns_[i].align == Align::left && !last) out += padding;
    if (last) {
      out += '\n';
    } else {
      out.append(kGap, ' ');
    }
  };

  out.append(indent, ' ');
  for (std::size_t i = 0; i < columns_.size(); ++i) add_cell(i, columns_[i].title, Paint::strong);
  for (const auto& row : rows_) {
    out.append(indent, ' ');
    for (std::size_t i = 0; i < columns_.size(); ++i) add_cell(i, row[i].text, row[i].paint);
  }
  return out;
}

}  // namespace refit::ctl
