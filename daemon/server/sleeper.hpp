// Sleeper: an engine that gives its memory up for a while, and takes refits again when it wakes.
//
// The loop thread; unmapping runs on the background pool. What sleep leaves of a module is its
// name, manifest and state words; waking wants the memory of each to be registered again, because
// it lies elsewhere then.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "server/background_pool.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"
#include "server/scheduler.hpp"

namespace refit::daemon {

class Sleeper {
 public:
  Sleeper(Registry& registry, Scheduler& scheduler, Replies& replies, BackgroundPool& background,
          CompletionQueue& completions);
  ~Sleeper();

  /// Refuses what waits for the engine. False: a refit is writing it.
  std::function<bool(Session&)> release_engine;
  /// The module's registration is about to be replaced.
  std::function<bool(Session&, Module&)> release_module;

  /// Answered when none of the engine's memory is mapped here any more; never in the middle of a
  /// write.
  void sleep(Session& session, std::uint64_t request_id);
  void wake(Session& session, std::uint64_t request_id);
  void on_session_end(Session& session);

 private:
  class SleepOperation;
  class UnmapJob;

  void unmap(SleepOperation& operation);
  void finish(SleepOperation& operation);
  void remove(SleepOperation& operation);

  Registry& registry_;
  Scheduler& scheduler_;
  Replies& replies_;
  BackgroundPool& background_;
  CompletionQueue& completions_;
  std::vector<std::unique_ptr<SleepOperation>> operations_;
};

}  // namespace refit::daemon
