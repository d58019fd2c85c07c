// `refitctl drain`. One thread. Knows nothing of the option library.
#include "refitctl/drain.hpp"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "refitctl/ask.hpp"
#include "refitctl/format/units.hpp"
#include "refitctl/output.hpp"

namespace refit::ctl {
namespace {

using Clock = Deadline::Clock;

/// One line that is overwritten, for a person who waits longer than a moment.
class Progress {
 public:
  explicit Progress(std::uint32_t pid) : pid_(pid), shown_(::isatty(STDERR_FILENO) == 1) {}
  ~Progress() {
    if (written_) write("");
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(double waited_us, std::size_t unanswered) {
    if (!shown_) return;
    written_ = true;
    write("waiting for refitd (pid " + std::to_string(pid_) +
          ") to end: " + format_uptime(static_cast<std::uint64_t>(waited_us)) + ", " +
          std::to_string(unanswered) + (unanswered == 1 ? " request" : " requests") + " running");
  }

 private:
  static void write(const std::string& line) {
    (void)write_all(STDERR_FILENO, "\r" + line + "\x1b[K");
  }

  std::uint32_t pid_;
  bool shown_;
  bool written_ = false;
};

Result<void> wait_for_end(Observer& observer, std::uint32_t pid, Clock::time_point start,
                          Deadline deadline) {
  constexpr std::chrono::milliseconds kTurn{500};
  Progress progress(pid);
  std::size_t unanswered = 0;
  for (;;) {
    const Deadline turn = Deadline::at(std::min(Clock::now() + kTurn, deadline.point()));
    Result<void> gone = observer.wait_gone(turn);
    if (gone || gone.error().code != Errc::deadline) return gone;
    if (deadline.passed()) {
      return fail(Errc::deadline,
                  "refitd (pid " + std::to_string(pid) + ") drains and has not ended yet");
    }
    // A daemon in the middle of its end does not answer; its process tells.
    if (Result<DaemonStatus> status = observer.status(Deadline::in(kTurn))) {
      unanswered = 0;
      for (const SessionStatus& session : status->sessions) unanswered += session.in_flight;
    }
    progress.show(us_since(start), unanswered);
  }
}

std::string drain_json(std::uint32_t pid, bool ended, double us) {
  const nlohmann::json json = {{"pid", pid}, {"ended", ended}, {"us", std::llround(us)}};
  return json.dump(2) + "\n";
}

std::string drain_text(std::uint32_t pid, bool ended, double us, const Style& style) {
  const std::string who =
      style.paint(Paint::strong, "refitd") + " (pid " + std::to_string(pid) + ")";
  return ended ? who + " has ended, after " + format_duration_us(us) + "\n"
               : who + " drains: what runs is finished, then it ends; --wait waits for that\n";
}

Failed still_there(const Options& options, Error error) {
  Failed failure = failed(options, std::move(error), Stage::ask);
  if (failure.value().error.code == Errc::deadline) {
    failure.value().advice =
        "it takes no new work and ends by itself; SIGTERM calls off what waits, and what is being "
        "written is always finished";
  }
  return failure;
}

}  // namespace

Outcome<Answer> drain(const Options& options, const Style& style) {
  const Deadline deadline = deadline_of(options);
  Outcome<Observer> observer = connect(options, deadline);
  if (!observer) return Failed(std::move(observer).error());
  const Result<DaemonStatus> status = observer->status(deadline);
  if (!status) return failed(options, status.error(), Stage::ask);
  const Clock::time_point start = Clock::now();
  if (Result<void> begun = observer->drain(deadline); !begun)
    return failed_as_operator(options, std::move(begun).error(), "drain");
  if (options.wait) {
    if (Result<void> gone = wait_for_end(*observer, status->pid, start, deadline); !gone)
      return still_there(options, std::move(gone).error());
  }
  const double us = us_since(start);
  return Answer{options.json ? drain_json(status->pid, options.wait, us)
                             : drain_text(status->pid, options.wait, us, style)};
}

}  // namespace refit::ctl
