// Writes finished text to a file descriptor.
//
// Any thread. Expects SIGPIPE to be ignored. Knows nothing of what the text says.
#pragma once

#include <string_view>

#include "refit/result.hpp"

namespace refit::ctl {

/// Writes all of `text`. A reader that closed its end has what it wanted (`refitctl tensors ... |
/// head`): no error.
[[nodiscard]] Result<void> write_all(int fd, std::string_view text);

}  // namespace refit::ctl
