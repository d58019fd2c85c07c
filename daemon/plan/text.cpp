// Quoting and describing; see text.hpp. Pure, any thread, knows no manifest.
#include "plan/text.hpp"

#include <algorithm>
#include <cstdint>

namespace refit::daemon {
namespace {

constexpr std::size_t kQuotedBytesMax = 512;

enum class TextKind { printable, control, no_utf8 };

TextKind kind_of(std::string_view text) noexcept {
  for (std::size_t i = 0; i < text.size();) {
    const auto lead = static_cast<std::uint8_t>(text[i]);
    if (lead < 0x80) {
      if (lead < 0x20 || lead == 0x7f) return TextKind::control;
      ++i;
      continue;
    }
    const std::size_t tail = lead >= 0xf0 ? 3U : lead >= 0xe0 ? 2U : 1U;
    if (lead < 0xc2 || lead > 0xf4 || text.size() - i <= tail) return TextKind::no_utf8;
    std::uint32_t code = lead & (0x3fU >> tail);
    for (std::size_t k = 1; k <= tail; ++k) {
      const auto byte = static_cast<std::uint8_t>(text[i + k]);
      if ((byte & 0xc0U) != 0x80U) return TextKind::no_utf8;
      code = (code << 6U) | (byte & 0x3fU);
    }
    // Overlong forms would let two spellings of one name pass as two names.
    const bool overlong = (tail == 2 && code < 0x800) || (tail == 3 && code < 0x10000);
    const bool surrogate = code >= 0xd800 && code <= 0xdfff;
    if (overlong || surrogate || code > 0x10ffff) return TextKind::no_utf8;
    if (code < 0xa0) return TextKind::control;
    i += tail + 1;
  }
  return TextKind::printable;
}

}  // namespace

std::string in_quotes(std::string_view text) {
  const bool cut = text.size() > kQuotedBytesMax;
  if (cut) text = text.substr(0, kQuotedBytesMax);
  const bool printable = kind_of(text) == TextKind::printable;
  std::string line;
  line.reserve(text.size() + 2);
  line += '\'';
  for (const char c : text) {
    const auto byte = static_cast<std::uint8_t>(c);
    if (byte < 0x20 || byte == 0x7f || (byte >= 0x80 && !printable)) {
      constexpr std::string_view kHex = "0123456789abcdef";
      line += "\\x";
      line += kHex[byte >> 4U];
      line += kHex[byte & 0xfU];
    } else {
      line += c;
    }
  }
  line += '\'';
  if (cut) line += "...";
  return line;
}

std::string describe(const TensorSpec& tensor, std::string_view label) {
  std::string text = in_quotes(tensor.name);
  text += " (";
  text += dtype_name(tensor.dtype);
  text += ", ";
  text += shape_repr(tensor.shape);
  if (tensor.global_shape != tensor.shape) {
    text += " at " + shape_repr(tensor.box_offset) + " of " + shape_repr(tensor.global_shape);
  }
  text += ") of ";
  text += label;
  return text;
}

std::optional<std::string> name_problem(std::string_view name, std::size_t bytes_max) {
  if (name.empty()) return "the name is empty";
  if (name.size() > bytes_max) {
    return "the name has " + std::to_string(name.size()) + " bytes, the limit is " +
           std::to_string(bytes_max);
  }
  switch (kind_of(name)) {
    case TextKind::printable:
      return std::nullopt;
    case TextKind::control:
      return "the name has a control character";
    case TextKind::no_utf8:
      return "the name is not UTF-8";
  }
  return std::nullopt;
}

}  // namespace refit::daemon
