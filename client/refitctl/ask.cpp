// Asking the daemon as the options say. One thread. Knows nothing of what is asked.
#include "refitctl/ask.hpp"

#include <chrono>

namespace refit::ctl {

Deadline deadline_of(const Options& options) {
  return Deadline::in(std::chrono::duration_cast<Deadline::Clock::duration>(
      std::chrono::duration<double>(options.timeout_s)));
}

Failed failed(const Options& options, Error error, Stage stage) {
  return Failed(explain(std::move(error), stage,
                        {options.socket_path, options.timeout_s, options.socket_given}));
}

Outcome<Observer> connect(const Options& options, Deadline deadline) {
  // A question now and then is not worth a spinning core.
  Result<Observer> observer =
      Observer::connect("refitctl", {options.socket_path, Waiting::off}, deadline);
  if (!observer) return failed(options, std::move(observer).error(), Stage::connect);
  return std::move(*observer);
}

}  // namespace refit::ctl
