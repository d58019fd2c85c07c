// A file that is replaced whole, as node_exporter's textfile collector wants it.
//
// Any thread. Knows nothing of what the text says.
#pragma once

#include <string>
#include <string_view>

#include "refit/result.hpp"

namespace refit::ctl {

/// Whoever reads `path` sees the old text or the new one, also after a crash: a file beside it is
/// written, synced and renamed, mode 0644. On an error nothing is left beside it.
[[nodiscard]] Result<void> replace_file(const std::string& path, std::string_view text);

}  // namespace refit::ctl
