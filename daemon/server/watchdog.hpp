// Watchdog: tells systemd that the daemon lives, from its loop, and only while its workers get on.
//
// The loop thread. A thread that pinged by itself would prove nothing; the loop alone would hide a
// worker that hangs, and with it every refit that waits for that worker.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "memory/copy_pool.hpp"
#include "server/background_pool.hpp"
#include "server/device_access.hpp"
#include "server/session.hpp"

namespace refit::daemon {

/// Which workers hang, from readings in the order of time. No clock and no thread of its own.
class WorkerHealth {
 public:
  using Clock = std::chrono::steady_clock;

  explicit WorkerHealth(Clock::duration bound) : bound_(bound) {}

  /// The first worker that has been in one job for `bound` without progress, or -1.
  int look(const std::vector<WorkerReading>& readings, Clock::time_point now);

 private:
  struct Seen {
    WorkerReading reading;
    Clock::time_point since;
  };
  Clock::duration bound_;
  std::vector<Seen> seen_;
};

class Watchdog {
 public:
  /// Null where nobody asked for pings ($WATCHDOG_USEC).
  static Result<std::unique_ptr<Watchdog>> create(sd_event* event, CopyPool& copy_pool,
                                                  BackgroundPool& background,
                                                  const DeviceAccess& devices);

  /// After a full turn of the loop: pings if it is time.
  void after_turn();

 private:
  Watchdog(std::chrono::microseconds period, CopyPool& copy_pool, BackgroundPool& background,
           const DeviceAccess& devices);
  void arm();
  [[nodiscard]] std::string worker_name(int index) const;

  std::chrono::microseconds period_;
  CopyPool& copy_pool_;
  BackgroundPool& background_;
  const DeviceAccess& devices_;
  WorkerHealth health_;
  std::vector<WorkerReading> readings_;
  EventSource timer_;
  bool due_ = true;
  bool hangs_ = false;
};

}  // namespace refit::daemon
