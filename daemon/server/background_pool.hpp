// BackgroundPool: threads for what may take long and must never hold the loop: populating pages,
// preparing copies on devices, hashing, closing fds that came from a client.
//
// submit: the loop thread. Parts run on pool threads, several at once; `finished` runs on the loop
// thread through the completion queue.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "posix/heartbeat.hpp"
#include "server/completion.hpp"

namespace refit::daemon {

/// Work in `part_count` independent parts.
class BackgroundJob : public Completion {
 public:
  explicit BackgroundJob(std::size_t part_count) : part_count_(part_count) {}
  virtual ~BackgroundJob() = default;
  /// Any pool thread; parts run in ascending order of start. Must not throw.
  virtual void run_part(std::size_t part) = 0;
  /// The loop thread, once, after the last part. The job is destroyed right after.
  virtual void finished() = 0;
  [[nodiscard]] std::size_t part_count() const noexcept { return part_count_; }

 private:
  friend class BackgroundPool;
  std::size_t part_count_;
  std::size_t next_part_ = 0;   ///< guarded by the pool
  std::size_t parts_done_ = 0;  ///< guarded by the pool
};

class BackgroundPool {
 public:
  BackgroundPool(unsigned threads, CompletionQueue& completions);
  /// Finishes running parts, drops what has not begun, joins.
  ~BackgroundPool();

  /// Whatever a client waits for goes ahead of hashing, which may take seconds.
  enum class Priority { first, last };
  void submit(std::unique_ptr<BackgroundJob> job, Priority priority);

  [[nodiscard]] unsigned thread_count() const noexcept {
    return static_cast<unsigned>(threads_.size());
  }
  /// How far thread `index` is, for whoever watches that it gets on.
  [[nodiscard]] WorkerReading read_worker(unsigned index) noexcept {
    return beats_[index].read(threads_[index].native_handle());
  }

 private:
  void serve(Heartbeat& beat);

  CompletionQueue& completions_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::deque<BackgroundJob*> jobs_;  ///< jobs with parts that nobody has taken
  bool stopping_ = false;
  std::unique_ptr<Heartbeat[]> beats_;  ///< one for each thread
  std::vector<std::thread> threads_;

  static void finish(Completion& completion);
};

}  // namespace refit::daemon
