// A screenful of text for a terminal. Pure; any thread. Knows nothing of what the text says.
#include "refitctl/format/frame.hpp"

#include <algorithm>
#include <vector>

#include "refitctl/format/text.hpp"

namespace refit::ctl {
namespace {

// A terminal that knows them shows a frame at once; others ignore them.
constexpr std::string_view kBegin = "\x1b[?2026h\x1b[H";
constexpr std::string_view kEnd = "\x1b[J\x1b[?2026l";

std::vector<std::string_view> lines_of(std::string_view text) {
  std::vector<std::string_view> lines;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    lines.push_back(text.substr(0, end));
    text.remove_prefix(std::min(end + 1, text.size()));
  }
  return lines;
}

// Bytes of the escape sequence or of the UTF-8 character that `text` begins with.
std::size_t step(std::string_view text) {
  if (text[0] == '\x1b') {
    const std::size_t end = text.find('m');
    return end == std::string_view::npos ? text.size() : end + 1;
  }
  std::size_t bytes = 1;
  while (bytes < text.size() && (static_cast<unsigned char>(text[bytes]) & 0xC0U) == 0x80U) ++bytes;
  return bytes;
}

}  // namespace

std::string crop(std::string_view line, std::size_t columns) {
  std::string out;
  std::size_t used = 0;
  bool coloured = false;
  while (!line.empty()) {
    const std::string_view piece = line.substr(0, step(line));
    line.remove_prefix(piece.size());
    if (piece[0] == '\x1b') {
      coloured = true;
    } else {
      used += display_width(piece);
      if (used > columns) break;
    }
    out += piece;
  }
  if (coloured) out += "\x1b[0m";
  return out;
}

std::string frame(std::string_view text, const ScreenSize& size) {
  const std::vector<std::string_view> lines = lines_of(text);
  const std::size_t rows = std::max<std::size_t>(size.rows, 1);
  const std::size_t shown = lines.size() <= rows ? lines.size() : rows - 1;
  std::string out(kBegin);
  for (std::size_t i = 0; i < shown; ++i) {
    if (i > 0) out += "\r\n";
    out += crop(lines[i], size.columns) + "\x1b[K";
  }
  if (shown < lines.size()) {
    if (shown > 0) out += "\r\n";
    const std::string more = "(" + std::to_string(lines.size() - shown) + " more lines)";
    out += crop(more, size.columns) + "\x1b[K";
  }
  return out + std::string(kEnd);
}

}  // namespace refit::ctl
