// CompletionQueue: how pool threads hand finished work back to the loop thread, without allocating.
//
// push: any thread. drain: the loop thread. The queue owns nothing; a node belongs to whoever
// pushed it until its function runs.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <utility>

#include "ipc/doorbell.hpp"

namespace refit::daemon {

/// Intrusive node: embed it in the work and set `run`.
struct Completion {
  void (*run)(Completion& self) = nullptr;
  Completion* next = nullptr;
};

class CompletionQueue {
 public:
  static Result<CompletionQueue> create() {
    CompletionQueue queue;
    REFIT_TRY_ASSIGN(queue.doorbell_, Doorbell::create());
    return queue;
  }
  CompletionQueue(CompletionQueue&& other) noexcept : doorbell_(std::move(other.doorbell_)) {}

  void push(Completion& completion) noexcept {
    {
      const std::lock_guard lock(mutex_);
      completion.next = nullptr;
      (last_ == nullptr ? first_ : last_->next) = &completion;
      last_ = &completion;
      waiting_.store(true);
    }
    doorbell_.ring();
  }

  /// Runs what was pushed so far.
  void drain() {
    Completion* node = nullptr;
    {
      const std::lock_guard lock(mutex_);
      node = first_;
      first_ = last_ = nullptr;
      waiting_.store(false);
    }
    while (node != nullptr) {
      Completion* next = node->next;  // run() may free the node
      node->run(*node);
      node = next;
    }
  }

  /// One load; for a loop that never blocks.
  [[nodiscard]] bool waiting() const noexcept { return waiting_.load(); }
  [[nodiscard]] int fd() const noexcept { return doorbell_.fd(); }

 private:
  CompletionQueue() = default;
  Doorbell doorbell_;
  std::mutex mutex_;
  Completion* first_ = nullptr;
  Completion* last_ = nullptr;
  std::atomic<bool> waiting_{false};
};

/// Has `act` run on the loop thread when the last copy of what it returns is gone, on whichever
/// thread that was. Allocates.
template <typename Act>
std::shared_ptr<void> when_let_go(CompletionQueue& queue, Act act) {
  struct Waiting final : Completion {
    explicit Waiting(Act wanted) : act(std::move(wanted)) {
      run = [](Completion& self) {
        const std::unique_ptr<Waiting> waiting(static_cast<Waiting*>(&self));
        waiting->act();
      };
    }
    Act act;
  };
  return std::shared_ptr<Waiting>(new Waiting(std::move(act)),
                                  [&queue](Waiting* waiting) { queue.push(*waiting); });
}

}  // namespace refit::daemon
