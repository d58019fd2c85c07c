// Server: the event loop: accepts clients, reads their rings, hands each request to whoever answers
// it.
//
// One thread runs the loop and owns all state here; copying and hashing happen on the pools.
// Clients can end their own session by what they send, and nothing else.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "config/configuration.hpp"
#include "memory/copy_pool.hpp"
#include "server/background_pool.hpp"
#include "server/checker.hpp"
#include "server/completion.hpp"
#include "server/listener.hpp"
#include "server/prover.hpp"
#include "server/refits.hpp"
#include "server/registrar.hpp"
#include "server/registry.hpp"
#include "server/reloader.hpp"
#include "server/replies.hpp"
#include "server/reports.hpp"
#include "server/scheduler.hpp"
#include "server/sleeper.hpp"
#include "server/statistics.hpp"
#include "server/watchdog.hpp"

namespace refit::daemon {

class Server {
 public:
  /// `source` is where a reload reads again.
  static Result<std::unique_ptr<Server>> create(Configuration configuration,
                                                ConfigurationSource source, Listener listener);
  ~Server();

  /// Serves until a signal has drained it. SIGTERM, SIGINT and SIGHUP must be blocked in every
  /// thread.
  Result<void> run();

 private:
  Server(Configuration configuration, Listener listener, CompletionQueue completions,
         std::unique_ptr<CopyPool> copy_pool);
  Result<void> set_up(ConfigurationSource source);

  // connecting
  struct Connecting {
    UniqueFd socket;
    Clock::time_point expires;
    EventSource source;
  };
  void on_listener();
  void drop_oldest_connecting();
  void on_hello(Connecting& connecting);
  Result<std::shared_ptr<Session>> admit(Connecting& connecting, const struct Hello& hello);
  Result<void> watch(const std::shared_ptr<Session>& session);
  void refuse(int socket, const Error& error);

  // a session's life
  void on_doorbell(Session& session);
  void on_socket(Session& session, std::uint32_t events);
  void drain_tickets(Session& session);
  void violate(Session& session, const std::string& reason);
  void end_session(Session& session, const std::string& reason);
  void end_overrun_sessions();
  void discard_tickets(Session& session, Clock::time_point until);
  void bury();

  // requests
  void dispatch(Session& session, const Session::Request& request);
  template <typename Message, typename Handler>
  void with_message(Session& session, const Session::Request& request, Handler&& handler);

  // time and signals
  void arm_timer();
  void on_timer();
  void on_configuration_changed();
  void begin_drain(const std::string& cause);
  void drain(Session& asker, std::uint64_t request_id);
  [[nodiscard]] DaemonFacts facts(Clock::time_point now) const;
  void poll_everything();

  static int event(Server& server, int outcome);

  [[nodiscard]] const Settings& settings() const noexcept { return configuration_.settings; }

  Configuration configuration_;  ///< only the Reloader changes it
  Listener listener_;
  Clock::time_point started_;
  UniqueFd own_pidfd_;
  CompletionQueue completions_;
  DeviceAccess devices_;
  std::unique_ptr<CopyPool> copy_pool_;
  std::unique_ptr<BackgroundPool> background_;
  std::unique_ptr<BackgroundPool> closers_;
  Registry registry_;
  Scheduler scheduler_;
  Replies replies_;
  Statistics statistics_;
  std::unique_ptr<Registrar> registrar_;
  std::unique_ptr<Refits> refits_;
  std::unique_ptr<Checker> checker_;
  std::unique_ptr<Prover> prover_;
  std::unique_ptr<Sleeper> sleeper_;
  std::unique_ptr<Reloader> reloader_;

  struct EventUnref {
    void operator()(sd_event* event) const noexcept { sd_event_unref(event); }
  };
  std::unique_ptr<sd_event, EventUnref> event_;
  EventSource listener_source_;
  EventSource completion_source_;
  EventSource timer_;
  std::optional<Error> device_lost_;    ///< ends the daemon; the supervisor starts another
  std::unique_ptr<Watchdog> watchdog_;  ///< none where systemd asked for none
  std::vector<EventSource> signal_sources_;
  Clock::time_point timer_armed_ = Clock::time_point::max();
  Clock::time_point drain_until_ = Clock::time_point::max();
  bool draining_ = false;
  Clock::time_point listen_again_ = Clock::time_point::max();
  std::vector<std::unique_ptr<Connecting>> connecting_;
  std::vector<std::uint64_t> overrun_;  ///< ids of sessions that let their replies pile up
  std::vector<std::shared_ptr<Session>>
      dead_;  ///< ended in this turn; freed when no handler of theirs is running
  std::uint64_t next_session_ = 1;
  unsigned spinning_sessions_ = 0;
};

}  // namespace refit::daemon
