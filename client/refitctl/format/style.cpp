// Whether and how text is coloured. Any thread; reads the environment. Knows nothing of tables.
#include "refitctl/format/style.hpp"

#include <unistd.h>

#include <cstdlib>

namespace refit::ctl {
namespace {

const char* sequence(Paint paint) noexcept {
  switch (paint) {
    case Paint::none:
      return "";
    case Paint::strong:
      return "\x1b[1m";
    case Paint::good:
      return "\x1b[32m";
    case Paint::warning:
      return "\x1b[33m";
    case Paint::bad:
      return "\x1b[1;31m";
  }
  return "";
}

}  // namespace

std::string Style::paint(Paint paint, std::string_view text) const {
  if (!colour || paint == Paint::none) return std::string(text);
  return sequence(paint) + std::string(text) + "\x1b[0m";
}

bool colour_wanted(bool is_terminal, const char* no_color, const char* term) noexcept {
  if (!is_terminal) return false;
  if (no_color != nullptr && no_color[0] != '\0') return false;
  return term != nullptr && term[0] != '\0' && std::string_view(term) != "dumb";
}

Style style_of(int fd) noexcept {
  return Style{colour_wanted(::isatty(fd) == 1, std::getenv("NO_COLOR"), std::getenv("TERM"))};
}

}  // namespace refit::ctl
