// Whether and how text is coloured.
//
// Pure but for style_of(), which asks about a file descriptor and the environment. Any thread.
// Knows nothing of tables.
#pragma once

#include <string>
#include <string_view>

namespace refit::ctl {

enum class Paint { none, strong, good, warning, bad };

struct Style {
  bool colour = false;

  /// `text` between the paint's escape sequences; `text` itself without colour.
  [[nodiscard]] std::string paint(Paint paint, std::string_view text) const;
};

/// Colours are for terminals that know them, and only where NO_COLOR is unset or empty. Null means
/// unset.
[[nodiscard]] bool colour_wanted(bool is_terminal, const char* no_color, const char* term) noexcept;

/// The style for what is written to `fd`.
[[nodiscard]] Style style_of(int fd) noexcept;

}  // namespace refit::ctl
