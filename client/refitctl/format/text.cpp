// Escaping and measuring of foreign text. Pure; any thread. Knows nothing of tables, colours or
// what the text means.
#include "refitctl/format/text.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>

namespace refit::ctl {
namespace {

struct CodePoint {
  std::uint32_t value = 0;
  std::size_t bytes = 0;  ///< 0: the first byte begins no valid UTF-8 sequence
};

struct Range {
  std::uint32_t first;
  std::uint32_t last;
};

// Format characters that reorder, join or hide what stands beside them: one name could pass for
// another.
constexpr std::array<Range, 9> kInvisible{{{0x00AD, 0x00AD},
                                           {0x061C, 0x061C},
                                           {0x180E, 0x180E},
                                           {0x200B, 0x200F},
                                           {0x2028, 0x202E},
                                           {0x2060, 0x206F},
                                           {0xFEFF, 0xFEFF},
                                           {0xFFF9, 0xFFFB},
                                           {0xE0000, 0xE0FFF}}};

constexpr std::array<Range, 9> kWide{{{0x1100, 0x115F},
                                      {0x2E80, 0xA4CF},
                                      {0xAC00, 0xD7A3},
                                      {0xF900, 0xFAFF},
                                      {0xFE30, 0xFE6F},
                                      {0xFF00, 0xFF60},
                                      {0xFFE0, 0xFFE6},
                                      {0x1F300, 0x1F9FF},
                                      {0x20000, 0x3FFFD}}};

constexpr std::array<Range, 5> kCombining{
    {{0x0300, 0x036F}, {0x1AB0, 0x1AFF}, {0x1DC0, 0x1DFF}, {0x20D0, 0x20FF}, {0xFE00, 0xFE2F}}};

template <std::size_t N>
bool contains(const std::array<Range, N>& ranges, std::uint32_t value) noexcept {
  return std::any_of(ranges.begin(), ranges.end(), [value](const Range& range) {
    return value >= range.first && value <= range.last;
  });
}

CodePoint decode(std::string_view text) noexcept {
  const auto byte = [text](std::size_t i) { return static_cast<std::uint8_t>(text[i]); };
  const std::uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1};
  const std::size_t bytes = lead >= 0xF0 ? 4 : lead >= 0xE0 ? 3 : 2;
  if (lead < 0xC2 || lead > 0xF4 || text.size() < bytes) return {};
  std::uint32_t value = lead & (0xFFU >> (bytes + 1));
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {};
    value = value << 6 | (byte(i) & 0x3FU);
  }
  // Overlong forms, surrogates and what lies beyond Unicode are refused, or one name would have
  // several spellings.
  if (bytes == 3 && (value < 0x800 || (value >= 0xD800 && value <= 0xDFFF))) return {};
  if (bytes == 4 && (value < 0x10000 || value > 0x10FFFF)) return {};
  return {value, bytes};
}

void append_hex(std::string& out, const char* format, std::uint32_t value) {
  std::array<char, 16> buffer{};
  std::snprintf(buffer.data(), buffer.size(), format, value);
  out += buffer.data();
}

}  // namespace

std::string escape(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const CodePoint point = decode(text);
    if (point.bytes == 0) {
      append_hex(out, "\\x%02x", static_cast<std::uint8_t>(text.front()));
      text.remove_prefix(1);
      continue;
    }
    switch (point.value) {
      case '\n':
        out += "\\n";
        break;
      case '\r':
        out += "\\r";
        break;
      case '\t':
        out += "\\t";
        break;
      case '\\':
        out += "\\\\";
        break;
      default:
        if (point.value < 0x20 || point.value == 0x7F) {
          append_hex(out, "\\x%02x", point.value);
        } else if ((point.value >= 0x80 && point.value <= 0x9F) ||
                   contains(kInvisible, point.value)) {
          append_hex(out, "\\u{%x}", point.value);
        } else {
          out += text.substr(0, point.bytes);
        }
    }
    text.remove_prefix(point.bytes);
  }
  return out;
}

std::size_t display_width(std::string_view escaped) {
  std::size_t columns = 0;
  while (!escaped.empty()) {
    const CodePoint point = decode(escaped);
    if (contains(kWide, point.value)) {
      columns += 2;
    } else if (!contains(kCombining, point.value)) {
      columns += 1;
    }
    escaped.remove_prefix(std::max<std::size_t>(point.bytes, 1));
  }
  return columns;
}

bool is_utf8(std::string_view text) noexcept {
  while (!text.empty()) {
    const CodePoint point = decode(text);
    if (point.bytes == 0) return false;
    text.remove_prefix(point.bytes);
  }
  return true;
}

}  // namespace refit::ctl
