// The commands: ask the daemon, and make the answer into text.
//
// One thread. Writes nothing itself but a file of metrics and the progress of a drain. Knows
// nothing of the option library and of file descriptors but the manifest's.
#pragma once

#include <string>

#include "refitctl/failure.hpp"
#include "refitctl/format/style.hpp"
#include "refitctl/options.hpp"

namespace refit::ctl {

/// What a command has to say; `exit` is not ok where the answer itself is bad news.
struct Answer {
  std::string text;
  ExitCode exit = ExitCode::ok;
};

/// Blocks until answered or the options' timeout.
[[nodiscard]] Outcome<Answer> run_command(const Options& options, const Style& style);

}  // namespace refit::ctl
