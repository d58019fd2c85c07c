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

Failed failed_as_operator(const Options& options, Error error, const std::string& command) {
  Failed failure = failed(options, std::move(error), Stage::ask);
  if (failure.value().error.code == Errc::permission) {
    failure.value().advice =
        "`sudo refitctl " + command + "`, or as the user that the daemon runs as";
  }
  return failure;
}

double us_since(Deadline::Clock::time_point start) {
  return std::chrono::duration<double, std::micro>(Deadline::Clock::now() - start).count();
}

Outcome<Observer> connect(const Options& options, Deadline deadline) {
  // A question now and then is not worth a spinning core.
  Result<Observer> observer =
      Observer::connect("refitctl", {options.socket_path, Waiting::off}, deadline);
  if (!observer) return failed(options, std::move(observer).error(), Stage::connect);
  return std::move(*observer);
}

}  // namespace refit::ctl
