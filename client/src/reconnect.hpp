// Reconnect: how a client comes back after its daemon's end: a new session, and every module
// registered again, a step at a time.
//
// One thread. step() never blocks, so that an engine's loop, an epoll loop, a serving thread and a
// trainer that waits all drive the same code. Retries only what may pass by itself: that nobody
// serves the socket now. Knows no gate and no refit; whoever starts it has made sure that the old
// daemon cannot write any more.
#pragma once

#include <poll.h>

#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "refit/module.hpp"
#include "requests.hpp"
#include "session.hpp"

namespace refit {

/// Doubles from 5 ms up to `longest`.
class Backoff {
 public:
  explicit Backoff(std::chrono::milliseconds longest = std::chrono::milliseconds(250)) noexcept
      : longest_(longest) {}
  std::chrono::milliseconds next() noexcept {
    const auto pause = pause_;
    pause_ = std::min(pause_ * 2, longest_);
    return pause;
  }

 private:
  std::chrono::milliseconds longest_;
  std::chrono::milliseconds pause_{5};
};

class Reconnect {
 public:
  /// A module to register, what is known of its bytes, and the number of its first residency word.
  /// `index` is set once it is registered.
  struct Module {
    ModuleSpec spec;
    HeldState held;
    std::uint32_t words = 0;
    std::uint32_t index = 0;
  };
  using Clock = Deadline::Clock;

  /// `options` name the socket: a client comes back to where it was, whatever the environment says
  /// meanwhile.
  Reconnect(Role role, std::string name, ConnectOptions options)
      : role_(role), name_(std::move(name)), options_(std::move(options)) {}

  /// Begins anew; the first attempt is due at once. `asleep`: an engine that sleeps says so.
  void start(std::vector<Module> modules, bool asleep = false);

  enum class Step {
    waits,  ///< for append_fds() or next_attempt()
    moved,  ///< the daemon was sent something; its answer takes a moment
    done,   ///< take_session() and modules()
  };
  /// Errors: those that no waiting mends (permission, protocol_version, bad_manifest, quota, a name
  /// that another process keeps).
  Result<Step> step();

  /// What to poll before the next step.
  void append_fds(std::vector<pollfd>& fds) const;
  /// When the next attempt is due; max while an answer is awaited.
  [[nodiscard]] Clock::time_point next_attempt() const noexcept {
    return session_ == nullptr ? next_attempt_ : Clock::time_point::max();
  }
  /// Why it has not succeeded yet, for the error of whoever stops waiting.
  [[nodiscard]] std::string why_not_yet() const;

  [[nodiscard]] std::unique_ptr<Session> take_session() { return std::move(session_); }
  [[nodiscard]] std::vector<Module>& modules() noexcept { return modules_; }

 private:
  Result<Step> advance();
  Result<Step> register_next();
  [[nodiscard]] bool may_pass(const Error& error);

  Role role_;
  std::string name_;
  ConnectOptions options_;
  std::vector<Module> modules_;
  std::unique_ptr<Session> session_;
  bool asleep_ = false;
  bool welcomed_ = false;
  std::size_t registered_ = 0;  ///< of modules_
  std::uint64_t request_ = 0;   ///< the registration that is under way, or 0
  Backoff backoff_;
  Clock::time_point next_attempt_;
  std::optional<Clock::time_point> refused_since_;
  std::optional<Error> last_failure_;
};

/// Sleeps until one of `fds` is ready, `until` or `deadline`, whichever comes first.
void wait_for(std::vector<pollfd>& fds, Deadline::Clock::time_point until, Deadline deadline);

}  // namespace refit
