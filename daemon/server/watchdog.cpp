#include "server/watchdog.hpp"

#include <systemd/sd-daemon.h>

#include "log.hpp"

namespace refit::daemon {

int WorkerHealth::look(const std::vector<WorkerReading>& readings, Clock::time_point now) {
  seen_.resize(readings.size());
  int hanging = -1;
  for (std::size_t i = 0; i < readings.size(); ++i) {
    Seen& seen = seen_[i];
    if (!readings[i].in_a_job() || !(readings[i] == seen.reading)) {
      seen = {readings[i], now};
    } else if (hanging < 0 && now - seen.since >= bound_) {
      hanging = static_cast<int>(i);
    }
  }
  return hanging;
}

Watchdog::Watchdog(std::chrono::microseconds period, CopyPool& copy_pool,
                   BackgroundPool& background, const DeviceAccess& devices)
    : period_(period),
      copy_pool_(copy_pool),
      background_(background),
      devices_(devices),
      health_(period) {
  // And one that copies on devices, once there are any.
  readings_.resize(copy_pool.thread_count() + background.thread_count() + 1);
}

Result<std::unique_ptr<Watchdog>> Watchdog::create(sd_event* event, CopyPool& copy_pool,
                                                   BackgroundPool& background,
                                                   const DeviceAccess& devices) {
  std::uint64_t period_us = 0;
  const int asked = ::sd_watchdog_enabled(0, &period_us);
  if (asked < 0) return fail_os("reading WATCHDOG_USEC", -asked);
  if (asked == 0) return std::unique_ptr<Watchdog>();
  std::unique_ptr<Watchdog> watchdog(
      new Watchdog(std::chrono::microseconds(period_us), copy_pool, background, devices));
  sd_event_source* source = nullptr;
  const int code = sd_event_add_time(
      event, &source, CLOCK_MONOTONIC, 0, /*accuracy=*/1000,
      [](sd_event_source*, std::uint64_t, void* self) {
        static_cast<Watchdog*>(self)->due_ = true;
        return 0;
      },
      watchdog.get());
  if (code < 0) return fail_os("making the watchdog's timer", -code);
  watchdog->timer_.reset(source);
  return watchdog;
}

void Watchdog::after_turn() {
  if (!due_) return;
  due_ = false;
  unsigned worker = 0;
  for (unsigned i = 0; i < copy_pool_.thread_count(); ++i)
    readings_[worker++] = copy_pool_.read_worker(i);
  for (unsigned i = 0; i < background_.thread_count(); ++i)
    readings_[worker++] = background_.read_worker(i);
  if (Devices* const devices = devices_.known()) readings_[worker] = devices->read_worker();
  const int hanging = health_.look(readings_, WorkerHealth::Clock::now());
  if (hanging < 0) {
    hangs_ = false;
    ::sd_notify(0, "WATCHDOG=1");
  } else if (!hangs_) {
    hangs_ = true;
    log(LogEvent::worker_hangs, worker_name(hanging) + " has been in one job for " +
                                    std::to_string(period_.count() / 1000) +
                                    " ms and did nothing: no watchdog pings until it goes on");
  }
  arm();
}

/// Half of what systemd allows, so that one late turn is no death.
void Watchdog::arm() {
  sd_event_source_set_time_relative(timer_.get(), static_cast<std::uint64_t>(period_.count()) / 2);
  sd_event_source_set_enabled(timer_.get(), SD_EVENT_ONESHOT);
}

std::string Watchdog::worker_name(int index) const {
  const unsigned copies = copy_pool_.thread_count();
  const auto worker = static_cast<unsigned>(index);
  if (worker == copies + background_.thread_count()) return "the device copy thread";
  return worker < copies ? "copy thread " + std::to_string(worker)
                         : "background thread " + std::to_string(worker - copies);
}

}  // namespace refit::daemon
