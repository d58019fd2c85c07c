// Heartbeat: tells a watcher whether a worker thread gets on with its job.
//
// The worker writes, one watcher reads, at any time. A job may take as long as its bytes need, so
// there is no clock in here: progress is a job that ended, or CPU time that the thread used in one.
// A thread that waits for ever inside a job uses none.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <ctime>

namespace refit {

struct WorkerReading {
  std::uint64_t turns = 0;  ///< odd while in a job
  std::int64_t cpu_ns = 0;

  [[nodiscard]] bool in_a_job() const noexcept { return turns % 2 == 1; }
  bool operator==(const WorkerReading&) const = default;
};

class Heartbeat {
 public:
  // Relaxed: the watcher compares readings of its own, and nothing is published through them.
  void job_begins() noexcept { turns_.fetch_add(1, std::memory_order_relaxed); }
  void job_ends() noexcept { turns_.fetch_add(1, std::memory_order_relaxed); }

  /// Of the thread that this heartbeat belongs to, which has not been joined.
  [[nodiscard]] WorkerReading read(pthread_t thread) const noexcept {
    WorkerReading reading;
    reading.turns = turns_.load(std::memory_order_relaxed);
    clockid_t clock{};
    timespec used{};
    if (::pthread_getcpuclockid(thread, &clock) == 0 && ::clock_gettime(clock, &used) == 0)
      reading.cpu_ns = std::int64_t{used.tv_sec} * 1'000'000'000 + used.tv_nsec;
    return reading;
  }

 private:
  alignas(64) std::atomic<std::uint64_t> turns_{0};
};

}  // namespace refit
