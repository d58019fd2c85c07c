// `refitctl reload`: lets the daemon read its configuration again, and says
// what that changed.
//
// One thread. Knows nothing of the option library.
#pragma once

#include "refitctl/commands.hpp"

namespace refit::ctl {

[[nodiscard]] Outcome<Answer> reload(const Options& options, const Style& style);

}  // namespace refit::ctl
