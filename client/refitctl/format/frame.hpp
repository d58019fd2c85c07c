// A screenful of text for a terminal that is drawn over the one before.
//
// Pure; any thread. Knows the escape sequences that Style makes and those that every terminal since
// the VT100 obeys. Knows nothing of what the text says.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace refit::ctl {

struct ScreenSize {
  std::size_t rows = 24;
  std::size_t columns = 80;
};

/// The part of `line` that fits into `columns`, with its colours ended.
[[nodiscard]] std::string crop(std::string_view line, std::size_t columns);

/// `text` as one write that redraws without flicker: the cursor goes home, every line overwrites
/// the one that stands there and clears the rest of it, what is below is cleared last. Lines are
/// cut at the screen's width; of lines that do not fit below each other the last one says how many.
[[nodiscard]] std::string frame(std::string_view text, const ScreenSize& size);

// The alternate screen without a cursor, and back to what was there before.
inline constexpr std::string_view kEnterScreen = "\x1b[?1049h\x1b[?25l";
inline constexpr std::string_view kLeaveScreen = "\x1b[?25h\x1b[?1049l";

}  // namespace refit::ctl
