// The simulation's background work: a fiber of the daemon that takes its time.
//
// Linked in the place of daemon/server/background_pool.cpp.
#include "server/background_pool.hpp"

#include "kernel.hpp"

namespace refit::daemon {

BackgroundPool::BackgroundPool(unsigned, CompletionQueue& completions) : completions_(completions) {
  auto& kernel = sim::kernel();
  beats_ = std::make_unique<Heartbeat[]>(1);
  kernel.spawn(kernel.self(), [this] { serve(beats_[0]); });
}

BackgroundPool::~BackgroundPool() {
  for (BackgroundJob* job : jobs_) delete job;
}

void BackgroundPool::submit(std::unique_ptr<BackgroundJob> job, Priority priority) {
  job->run = &BackgroundPool::finish;
  if (priority == Priority::first) {
    jobs_.push_front(job.release());
  } else {
    jobs_.push_back(job.release());
  }
}

void BackgroundPool::serve(Heartbeat&) {
  auto& kernel = sim::kernel();
  for (;;) {
    if (!kernel.wait([this] { return !jobs_.empty(); })) return;
    std::unique_ptr<BackgroundJob> job(jobs_.front());
    jobs_.pop_front();
    for (std::size_t part = 0; part < job->part_count_; ++part) {
      sim::give_way();
      if (!kernel.dying()) job->run_part(part);
    }
    if (kernel.dying()) return;
    completions_.push(*job.release());
  }
}

void BackgroundPool::finish(Completion& completion) {
  const std::unique_ptr<BackgroundJob> job(static_cast<BackgroundJob*>(&completion));
  job->finished();
}

}  // namespace refit::daemon
