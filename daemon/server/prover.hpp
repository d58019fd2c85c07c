// Prover: after each commit, reads what the engine holds and compares it with what was written.
//
// Threads of low priority compare XXH3-128 of source and target, block by block; no refit waits for
// them. The trainer may change its tensors as soon as it has its answer, and another refit may
// begin: equal blocks under an unchanged state word prove the version, different ones prove
// nothing, because nobody knows whether the source moved on. Digests that came with the refit
// decide: bytes that have others poison the module. What a check proves is the Checker's. A layer
// is read in both of its places, in that on a device if it is there and stays for long enough.
//
// committed, forget and stop: the loop thread, which also gets what was found.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "server/completion.hpp"
#include "server/device_access.hpp"
#include "server/end_comparer.hpp"
#include "server/expected.hpp"
#include "server/plan_cache.hpp"
#include "server/statistics.hpp"

namespace refit::daemon {

class Prover {
 public:
  /// `threads` 0: nothing is ever proven here.
  Prover(unsigned threads, CompletionQueue& completions, DeviceAccess& devices,
         Statistics& statistics);
  ~Prover();

  /// `module` of `engine` holds what `plan` wrote. A proof of an earlier version is given up.
  /// Allocates for a module that it has not seen before.
  void committed(const Session& engine, const std::shared_ptr<Module>& module,
                 const std::shared_ptr<BoundPlan>& plan,
                 const std::shared_ptr<const Expected>& expected);
  /// Lets go of the memory of a registration within a block, whichever end of a plan it is.
  void forget(const Registration& registration);
  /// Ends the threads and lets go of all memory.
  void stop();

 private:
  /// One commit: the plan, and the word that stands as long as its bytes do.
  struct Commit {
    std::shared_ptr<BoundPlan> plan;
    std::shared_ptr<const Expected> expected;  ///< null if the trainer gave none
    std::shared_ptr<SessionMemory> engine;
    std::uint32_t slot = 0;
    std::uint64_t word = 0;
    std::uint64_t version = 0;
    Clock::time_point at;

    /// Whether what was read before was still the commit's.
    [[nodiscard]] bool stands() const noexcept {
      std::atomic_thread_fence(std::memory_order_acquire);
      return engine->response_region().modules[slot].word.load() == word;
    }
    [[nodiscard]] bool uses(const Registration& registration) const noexcept {
      return plan != nullptr &&
             (plan->source.get() == &registration || plan->target.get() == &registration);
    }
  };

  /// What became of one commit.
  struct Finding {
    ProofResult result = ProofResult::overtaken;
    std::uint64_t version = 0;
    std::uint64_t generation = 0;  ///< of the registration that was written
    bool whole = false;            ///< every tensor was

    // Of bytes that the digests refute.
    std::shared_ptr<SessionMemory> engine;
    std::uint32_t slot = 0;
    std::uint64_t word = 0;
    std::vector<std::string> wrong;  ///< tensors and places, sorted
  };

  /// The latest commit of one module, on its way to a thread and back to the loop.
  struct Entry final : Completion {
    explicit Entry(Prover& prover) : owner(prover) {}
    Prover& owner;
    std::weak_ptr<Module> module;  ///< the loop's
    // Guarded by the mutex.
    Commit wanted;   ///< without a plan: nothing is
    Commit proving;  ///< a thread reads it unlocked while it is busy
    bool queued = false;
    bool busy = false;
    bool reported = false;  ///< on its way to the loop
    Finding finding;

    std::atomic<bool> given_up{false};
  };

  [[nodiscard]] Entry& entry_of(const std::shared_ptr<Module>& module);
  void enqueue(Entry& entry);
  void serve();
  [[nodiscard]] Finding prove(const Entry& entry, EndComparer& comparer);
  [[nodiscard]] ProofResult hash(const Commit& commit, const std::function<bool()>& stands,
                                 std::vector<std::string>& wrong);
  static void poison(const Finding& finding, const Module& module);
  void found(Entry& entry);

  CompletionQueue& completions_;
  DeviceAccess& devices_;
  Statistics& statistics_;
  std::mutex mutex_;
  std::condition_variable work_;
  std::condition_variable quiet_;               ///< threads that let a burst pass
  std::deque<std::unique_ptr<Entry>> entries_;  ///< the loop's; those without a module are free
  std::vector<Entry*> queue_;                   ///< guarded
  bool stopping_ = false;                       ///< guarded
  std::vector<std::thread> threads_;
};

}  // namespace refit::daemon
