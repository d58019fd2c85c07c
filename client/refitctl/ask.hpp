// Asking the daemon as the options say: where it is, how long to wait, what to say if it fails.
//
// One thread. Knows nothing of what is asked.
#pragma once

#include <string>

#include "refit/observer.hpp"
#include "refitctl/failure.hpp"
#include "refitctl/options.hpp"

namespace refit::ctl {

[[nodiscard]] Deadline deadline_of(const Options& options);

[[nodiscard]] Outcome<Observer> connect(const Options& options, Deadline deadline);

/// How long something took.
[[nodiscard]] double us_since(Deadline::Clock::time_point start);

/// `error` with the exit code and the advice that fit these options.
[[nodiscard]] Failed failed(const Options& options, Error error, Stage stage);

/// The same of a command that only root and the daemon's own user may give.
[[nodiscard]] Failed failed_as_operator(const Options& options, Error error,
                                        const std::string& command);

}  // namespace refit::ctl
