#include "reconnect.hpp"

#include <algorithm>
#include <cerrno>

namespace refit {
namespace {

/// What a moment mends, and nothing else does: a session of this client's own that the daemon has
/// not noticed the end of holds the name, and systemd makes a socket before it gives it to its
/// group. A process that took the name keeps it, and a user who may not connect never may.
constexpr std::chrono::seconds kMomentMax{5};

/// Sending fds blocks only behind a daemon that stopped after its WELCOME.
constexpr std::chrono::milliseconds kSendMax{50};

}  // namespace

void Reconnect::start(std::vector<Module> modules, bool asleep) {
  modules_ = std::move(modules);
  asleep_ = asleep;
  session_.reset();
  backoff_ = Backoff();
  next_attempt_ = Clock::time_point::min();
  refused_since_.reset();
  last_failure_.reset();
}

bool Reconnect::may_pass(const Error& error) {
  const bool momentary =
      error.code == Errc::name_taken || (error.code == Errc::permission && session_ == nullptr);
  if (!momentary) refused_since_.reset();
  switch (error.code) {
    case Errc::os:
      return error.native == ENOENT || error.native == ECONNREFUSED || error.native == EAGAIN ||
             error.native == ECONNRESET || error.native == EPIPE;
    case Errc::daemon_gone:
      return session_ == nullptr || !session_->verdict();
    case Errc::shutting_down:
    case Errc::deadline:
      return true;
    default:
      if (!momentary) return false;
      if (!refused_since_) refused_since_ = Clock::now();
      return Clock::now() - *refused_since_ < kMomentMax;
  }
}

Result<Reconnect::Step> Reconnect::step() {
  auto step = advance();
  if (step) return step;
  const bool again = may_pass(step.error());
  session_.reset();
  if (!again) return step;
  last_failure_ = std::move(step).error();
  next_attempt_ = Clock::now() + backoff_.next();
  return Step::waits;
}

Result<Reconnect::Step> Reconnect::advance() {
  if (session_ == nullptr) {
    if (Clock::now() < next_attempt_) return Step::waits;
    welcomed_ = false;
    registered_ = 0;
    request_ = 0;
    REFIT_TRY_ASSIGN(session_, Session::begin(role_, name_, options_, asleep_));
    return Step::moved;
  }
  if (!welcomed_) {
    REFIT_TRY_ASSIGN(welcomed_, session_->welcomed());
    return welcomed_ ? register_next() : Step::waits;
  }
  REFIT_TRY_ASSIGN(const wire::Reply* reply, session_->poll_reply(request_));
  if (reply == nullptr) return Step::waits;
  REFIT_TRY_ASSIGN(modules_[registered_].index, registered_slot(*reply));
  ++registered_;
  return register_next();
}

Result<Reconnect::Step> Reconnect::register_next() {
  if (registered_ == modules_.size()) return Step::done;
  const Module& module = modules_[registered_];
  REFIT_TRY_ASSIGN(request_, post_registration(*session_, module.spec, module.held,
                                               Deadline::in(kSendMax), module.words));
  return Step::moved;
}

void Reconnect::append_fds(std::vector<pollfd>& fds) const {
  if (session_ == nullptr) return;
  if (!welcomed_) {
    fds.push_back({session_->socket_fd(), POLLIN, 0});
    return;
  }
  fds.push_back({session_->doorbell_fd(), POLLIN, 0});
  fds.push_back({session_->pidfd(), POLLIN, 0});
  fds.push_back({session_->socket_fd(), POLLRDHUP, 0});
}

std::string Reconnect::why_not_yet() const {
  if (session_ != nullptr) {
    return welcomed_ ? "the daemon at " + options_.socket_path + " has not registered " +
                           modules_[registered_].spec.name() + " yet"
                     : "no daemon at " + options_.socket_path + " has answered yet";
  }
  return last_failure_ ? last_failure_->message
                       : "no daemon at " + options_.socket_path + " was looked for yet";
}

void wait_for(std::vector<pollfd>& fds, Deadline::Clock::time_point until, Deadline deadline) {
  const Deadline first = Deadline::at(std::min(until, deadline.point()));
  ::poll(fds.data(), fds.size(), first.remaining_ms());
}

}  // namespace refit
