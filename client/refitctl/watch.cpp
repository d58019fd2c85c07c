// `refitctl status --watch`. One thread. Knows nothing of the option library.
#include "refitctl/watch.hpp"

#include <poll.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <csignal>
#include <ctime>
#include <optional>

#include "posix/unique_fd.hpp"
#include "refitctl/ask.hpp"
#include "refitctl/format/frame.hpp"
#include "refitctl/format/json.hpp"
#include "refitctl/format/style.hpp"
#include "refitctl/format/text.hpp"
#include "refitctl/format/units.hpp"
#include "refitctl/format/views.hpp"
#include "refitctl/output.hpp"

namespace refit::ctl {
namespace {

using Clock = Deadline::Clock;

/// A stopped daemon is asked no longer than this in one turn, so that Ctrl-C is heard.
constexpr std::chrono::milliseconds kTurnMax{1000};

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm fields{};
  ::gmtime_r(&now, &fields);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%SZ", &fields);
  return text;
}

/// What one turn saw: a status, or why there is none.
struct Look {
  std::optional<DaemonStatus> status;
  Error error;
  std::string note;  ///< what happened to the daemon meanwhile; empty if nothing did
};

/// Holds one session as long as the daemon lives, and opens another when it is back.
class Follower {
 public:
  Follower(const Options& options, Observer observer)
      : options_(options), observer_(std::move(observer)) {}

  Look look() {
    const Deadline deadline = Deadline::in(
        std::min<Clock::duration>(kTurnMax, deadline_of(options_).point() - Clock::now()));
    if (!observer_) {
      Outcome<Observer> again = connect(options_, deadline);
      if (!again) return without_answer(std::move(again).error().error);
      observer_.emplace(std::move(*again));
    }
    Result<DaemonStatus> status = observer_->status(deadline);
    if (!status) {
      // A daemon that is only slow keeps its session: another one would be slow as well.
      if (status.error().code != Errc::deadline) observer_.reset();
      return without_answer(std::move(status).error());
    }
    silent_since_.reset();
    if (pid_ != 0 && status->pid != pid_) {
      note_ = "the daemon was restarted at " + utc_now() + ": pid " + std::to_string(pid_) +
              " before, " + std::to_string(status->pid) + " now";
    }
    pid_ = status->pid;
    return {std::move(*status), {}, note_};
  }

 private:
  Look without_answer(Error error) {
    if (!silent_since_) silent_since_ = Clock::now();
    const auto silent_us =
        std::chrono::duration_cast<std::chrono::microseconds>(Clock::now() - *silent_since_);
    std::string note = observer_ ? "the daemon does not answer" : "the daemon is gone";
    note += ", since " + format_uptime(static_cast<std::uint64_t>(silent_us.count())) +
            "; looking for it";
    return {std::nullopt, std::move(error), std::move(note)};
  }

  const Options& options_;
  std::optional<Observer> observer_;
  std::optional<Clock::time_point> silent_since_;
  std::uint32_t pid_ = 0;
  std::string note_;
};

/// Where looks are shown. The destructor leaves everything as it was.
class Display {
 public:
  virtual ~Display() = default;
  virtual Result<void> show(const Look& look) = 0;
  /// Before the process is stopped, and after it went on.
  virtual Result<void> pause() { return {}; }
  virtual Result<void> resume() { return {}; }
};

class TerminalDisplay final : public Display {
 public:
  explicit TerminalDisplay(double interval_s) : interval_s_(interval_s) {}
  ~TerminalDisplay() override { (void)pause(); }
  TerminalDisplay(const TerminalDisplay&) = delete;
  TerminalDisplay& operator=(const TerminalDisplay&) = delete;

  Result<void> show(const Look& look) override {
    std::string text =
        utc_now() + "  every " + format_duration_us(interval_s_ * 1e6) + ", Ctrl-C ends\n";
    if (!look.note.empty()) text += style_.paint(Paint::warning, escape(look.note)) + "\n";
    text += look.status ? status_text(*look.status, style_) : escape(look.error.message) + "\n";
    REFIT_TRY(resume());
    return write_all(STDOUT_FILENO, frame(text, size()));
  }
  Result<void> pause() override {
    if (!std::exchange(entered_, false)) return {};
    return write_all(STDOUT_FILENO, kLeaveScreen);
  }
  Result<void> resume() override {
    if (std::exchange(entered_, true)) return {};
    return write_all(STDOUT_FILENO, kEnterScreen);
  }

 private:
  static ScreenSize size() {
    winsize window{};
    if (::ioctl(STDOUT_FILENO, TIOCGWINSZ, &window) != 0 || window.ws_row == 0 ||
        window.ws_col == 0)
      return {};
    return {window.ws_row, window.ws_col};
  }

  double interval_s_;
  bool entered_ = false;
  Style style_ = style_of(STDOUT_FILENO);
};

/// Lines for a pipe or a file: each turn adds its own.
class LineDisplay final : public Display {
 public:
  explicit LineDisplay(bool json) : json_(json) {}

  Result<void> show(const Look& look) override {
    return write_all(STDOUT_FILENO, json_ ? json_lines(look) : text_lines(look));
  }

 private:
  static std::string json_lines(const Look& look) {
    return look.status ? status_json_line(*look.status, utc_now(), look.note)
                       : silence_json_line(look.error, utc_now(), look.note);
  }

  std::string text_lines(const Look& look) {
    const std::string now = utc_now();
    std::string text;
    // A restart is told once; that the daemon is away, in every turn.
    if (!look.note.empty() && (!look.status || look.note != told_))
      text += now + " " + escape(look.note) + "\n";
    if (!look.status) return text;
    told_ = look.note;
    return text + status_lines(*look.status, now);
  }

  bool json_;
  std::string told_;
};

bool can_redraw(bool json) {
  if (json || ::isatty(STDOUT_FILENO) != 1) return false;
  const char* term = std::getenv("TERM");
  return term != nullptr && *term != '\0' && std::string_view(term) != "dumb";
}

enum class Event { turn, resized, stop_asked, end };

/// Waits for the next turn, a signal, or the end of whoever reads.
Event wait_for_event(int signals, Clock::time_point turn) {
  for (;;) {
    pollfd entries[] = {{signals, POLLIN, 0}, {STDOUT_FILENO, 0, 0}};
    const int count = ::poll(entries, 2, Deadline::at(turn).remaining_ms());
    if (count == 0) return Event::turn;
    if (count < 0) {
      if (errno == EINTR) continue;
      return Event::end;
    }
    if (entries[1].revents != 0) return Event::end;
    signalfd_siginfo info{};
    if (::read(signals, &info, sizeof info) != static_cast<ssize_t>(sizeof info)) continue;
    if (info.ssi_signo == SIGWINCH) return Event::resized;
    if (info.ssi_signo == SIGTSTP) return Event::stop_asked;
    return Event::end;
  }
}

Result<void> follow(const Options& options, Follower follower, Display& display, int signals) {
  const auto interval = std::chrono::duration_cast<Clock::duration>(
      std::chrono::duration<double>(*options.watch_interval_s));
  Look look = follower.look();
  Clock::time_point turn = Clock::now() + interval;
  REFIT_TRY(display.show(look));
  for (;;) {
    switch (wait_for_event(signals, turn)) {
      case Event::end:
        return {};
      case Event::stop_asked:
        REFIT_TRY(display.pause());
        ::raise(SIGSTOP);
        break;
      case Event::resized:
        break;
      case Event::turn:
        look = follower.look();
        turn = Clock::now() + interval;
    }
    REFIT_TRY(display.show(look));
  }
}

}  // namespace

Outcome<ExitCode> watch_status(const Options& options) {
  Outcome<Observer> observer = connect(options, deadline_of(options));
  if (!observer) return Failed(std::move(observer).error());

  // From here on they are events, so that the screen is left in order.
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP, SIGWINCH, SIGTSTP})
    ::sigaddset(&signals, signal);
  ::sigprocmask(SIG_BLOCK, &signals, nullptr);
  const UniqueFd events = UniqueFd::adopt(::signalfd(-1, &signals, SFD_CLOEXEC));
  if (!events) return failed(options, fail_os("signalfd", errno).value(), Stage::ask);

  std::unique_ptr<Display> display;
  if (can_redraw(options.json)) {
    display = std::make_unique<TerminalDisplay>(*options.watch_interval_s);
  } else {
    display = std::make_unique<LineDisplay>(options.json);
  }
  Result<void> ended =
      follow(options, Follower(options, std::move(*observer)), *display, events.get());
  display.reset();
  if (!ended) return failed(options, std::move(ended).error(), Stage::output);
  return ExitCode::ok;
}

}  // namespace refit::ctl
