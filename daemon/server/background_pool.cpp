#include "server/background_pool.hpp"

#include <pthread.h>

#include <algorithm>
#include <string>

namespace refit::daemon {

BackgroundPool::BackgroundPool(unsigned threads, CompletionQueue& completions)
    : completions_(completions) {
  threads = std::max(1U, threads);
  beats_ = std::make_unique<Heartbeat[]>(threads);
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([this, i] { serve(beats_[i]); });
    ::pthread_setname_np(threads_.back().native_handle(),
                         ("refit-back-" + std::to_string(i)).c_str());
  }
}

BackgroundPool::~BackgroundPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  work_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  for (BackgroundJob* job : jobs_) delete job;
}

void BackgroundPool::submit(std::unique_ptr<BackgroundJob> job, Priority priority) {
  job->run = &BackgroundPool::finish;
  if (job->part_count_ == 0) {
    completions_.push(*job.release());
    return;
  }
  {
    const std::lock_guard lock(mutex_);
    if (priority == Priority::first) {
      jobs_.push_front(job.release());
    } else {
      jobs_.push_back(job.release());
    }
  }
  work_.notify_all();
}

void BackgroundPool::serve(Heartbeat& beat) {
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
    if (stopping_) return;
    BackgroundJob* job = jobs_.front();
    const std::size_t part = job->next_part_++;
    if (job->next_part_ == job->part_count_) jobs_.pop_front();
    lock.unlock();
    beat.job_begins();
    job->run_part(part);
    beat.job_ends();
    lock.lock();
    if (++job->parts_done_ == job->part_count_) completions_.push(*job);
  }
}

void BackgroundPool::finish(Completion& completion) {
  const std::unique_ptr<BackgroundJob> job(static_cast<BackgroundJob*>(&completion));
  job->finished();
}

}  // namespace refit::daemon
