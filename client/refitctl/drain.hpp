// `refitctl drain`: asks the daemon to end, and waits for its end if told so.
//
// One thread. Writes its progress to a terminal on standard error and nothing else. Knows nothing
// of the option library.
#pragma once

#include "refitctl/commands.hpp"

namespace refit::ctl {

[[nodiscard]] Outcome<Answer> drain(const Options& options, const Style& style);

}  // namespace refit::ctl
