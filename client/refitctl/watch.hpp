// `refitctl status --watch`: looks at the daemon again and again over one session.
//
// One thread. Writes to standard output itself: on a terminal it redraws the alternate screen and
// leaves the old one as it was; elsewhere, and with --json, it appends lines. Takes the signals
// that end it as events. Knows nothing of the option library.
#pragma once

#include "refitctl/failure.hpp"
#include "refitctl/options.hpp"

namespace refit::ctl {

/// Ends with SIGINT, SIGTERM or SIGHUP, or when nobody reads any more. A daemon that goes away is
/// waited for; one that was not there at the start is an error.
[[nodiscard]] Outcome<ExitCode> watch_status(const Options& options);

}  // namespace refit::ctl
