// Makes text that others chose (names from a daemon, a file or a peer) safe and measurable on a
// terminal.
//
// Pure; any thread. Knows nothing of tables, colours or what the text means.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace refit::ctl {

/// `text` with everything that a terminal could obey or a reader could not see written out: control
/// characters (C0, DEL, C1), bytes that are no UTF-8 and backslashes as `\n`, `\x1b`, `\\`;
/// characters without a glyph that reorder or hide text as `\u{202e}`. What is left is valid UTF-8
/// in one line, and two texts that differ stay different.
[[nodiscard]] std::string escape(std::string_view text);

/// Terminal columns of escaped text: 2 for wide East Asian characters and emoji, 0 for combining
/// marks, else 1.
[[nodiscard]] std::size_t display_width(std::string_view escaped);

[[nodiscard]] bool is_utf8(std::string_view text) noexcept;

}  // namespace refit::ctl
