// A daemon of the simulation: the product's registrar, scheduler, refits and sessions, and a loop
// that stands for server.cpp's: which event is next is the seed's choice.
//
// What server.cpp does with sd-event, sockets and signals is not here; what it decides (who is
// admitted, which request is next, when a session ends) is.
#pragma once

#include <deque>
#include <memory>
#include <vector>

#include "link.hpp"
#include "server/refits.hpp"
#include "server/registrar.hpp"

namespace refit::sim {

class Daemon {
 public:
  /// In a fiber of the daemon's process.
  Daemon(Kernel& kernel, Waiting waiting, std::uint64_t first_link);
  ~Daemon();

  /// Serves until the process dies.
  void run();

  std::deque<std::shared_ptr<Connecting>> backlog;
  [[nodiscard]] std::uint64_t next_link() const noexcept { return next_link_; }

 private:
  [[nodiscard]] std::vector<std::function<void()>> due();
  void accept();
  void admit(Connecting& connecting);
  void on_doorbell(daemon::Session& session, Link& link);
  void dispatch(daemon::Session& session, const daemon::Session::Request& request);
  void end_session(daemon::Session& session);
  void end_overrun_sessions();
  void bury();

  Kernel& kernel_;
  std::shared_ptr<Process> process_;
  Waiting waiting_;
  const daemon::Configuration configuration_;  ///< the built-in one
  daemon::CompletionQueue completions_;
  std::unique_ptr<CopyPool> copy_pool_;
  daemon::BackgroundPool background_;
  daemon::BackgroundPool closers_;
  daemon::Registry registry_;
  daemon::Scheduler scheduler_;
  daemon::Replies replies_;
  daemon::Statistics statistics_;
  daemon::DeviceAccess devices_;
  daemon::Registrar registrar_;
  daemon::Refits refits_;
  std::map<std::uint64_t, std::shared_ptr<Link>> links_;
  std::vector<std::uint64_t> overrun_;
  std::vector<std::shared_ptr<daemon::Session>> dead_;
  std::uint64_t next_link_;
};

}  // namespace refit::sim
