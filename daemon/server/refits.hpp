// Refits: every refit from its request to its reply. Read start to end, this file's .cpp is one
// refit: request -> plan -> queue -> gate -> writing -> copy -> commit -> reply.
//
// The loop thread; bytes are moved by the copy pool, or here when they are few. What the first
// refit of a plan asks of devices is asked in the background. In the steady state nothing is
// allocated.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "memory/copy_pool.hpp"
#include "server/background_pool.hpp"
#include "server/completion.hpp"
#include "server/expected.hpp"
#include "server/plan_cache.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"
#include "server/scheduler.hpp"
#include "server/statistics.hpp"
#include "transaction/transaction.hpp"

namespace refit::daemon {

class Refits {
 public:
  Refits(Registry& registry, Scheduler& scheduler, Replies& replies, CopyPool& copy_pool,
         BackgroundPool& background, CompletionQueue& completions, DeviceAccess& devices,
         Statistics& statistics, Waiting waiting);
  ~Refits();

  void begin(Session& trainer, std::uint64_t request_id, const wire::Refit& message,
             Clock::time_point arrived);

  /// An engine rang: it may have answered its gate.
  void on_engine_answer(Session& engine);
  /// Looks at every gate; for a loop that never blocks.
  void poll_gates();
  /// A session is gone: what it began and had not started to write is called off.
  void on_session_end(Session& session);
  /// A module's registration goes away. False if a refit is writing it.
  bool on_registration_end(Session& session, Module& module);
  /// An engine gives its memory up: what waits for it is refused. False if a refit is writing it.
  bool on_engine_sleep(Session& engine);
  /// Fails what has waited too long, and looks again at what is waited for without being told;
  /// returns when to be called again (max: nothing waits).
  Clock::time_point on_time(Clock::time_point now);
  /// When a waiting refit has to be looked at next.
  [[nodiscard]] Clock::time_point next_deadline() const;

  /// A module holds what the plan wrote, and its trainer knows. Allocates nothing.
  std::function<void(const Session& engine, const std::shared_ptr<Module>&,
                     const std::shared_ptr<BoundPlan>&, const std::shared_ptr<const Expected>&)>
      on_commit;

  [[nodiscard]] bool idle() const noexcept { return active_.empty(); }
  /// Calls off everything that is not writing.
  void cancel_waiting(const Error& reason);

 private:
  enum class Phase { idle, queued, preparing, gating, writing };

  struct Target {
    std::size_t engine = 0;  ///< index into Operation::engines
    std::shared_ptr<Module> module;
    std::shared_ptr<BoundPlan> plan;
    std::shared_ptr<const Expected> expected;  ///< null if the trainer gave none
  };

  class Refit;
  friend class Refit;
  class Preparation;

  Refit& take_free();
  void retire(Refit& refit);

  [[nodiscard]] Refit* find_writing(const Session& trainer, const wire::Refit& message);
  [[nodiscard]] static bool same_targets(
      const Refit& refit, const flatbuffers::Vector<flatbuffers::Offset<wire::Target>>* wanted);
  void answer_instead(Refit& running, Session& trainer, std::uint64_t request_id);
  Result<void> resolve(Refit& refit, Session& trainer, const wire::Refit& message);
  Result<void> resolve_target(Refit& refit, Session& trainer, const wire::Target& wanted);
  Result<void> check_poison(const Refit& refit) const;
  bool replay(Refit& refit);
  [[nodiscard]] static ModuleBlock& block_of(const Refit& refit, const Target& target);
  [[nodiscard]] bool abandoned(const Refit& refit) const;
  void fail_late(Refit& refit);
  void open_gates(Refit& refit);
  [[nodiscard]] bool plans_are_ready(Refit& refit);
  void prepared(BoundPlan& plan, Result<std::unique_ptr<DeviceJob>> job);
  static void prefetch(const Refit& refit);
  void wait_briefly(Refit& refit);
  void on_readiness(Refit& refit);
  static Result<void> settle(Refit& refit);
  void write(Refit& refit);
  void job_done(Refit& refit);
  void copied(Refit& refit);
  void reply(Refit& refit);
  void fail_refit(Refit& refit, const Error& error);
  void release_engines(Refit& refit);
  [[nodiscard]] Result<bool> work_is_done(Refit& refit) const;
  void broken(Refit& refit, const DeviceOutcome& device);
  void wake_engines(Refit& refit);
  template <typename Predicate>
  Refit* find_waiting(Predicate&& matches);
  template <typename Predicate>
  bool call_off(Predicate&& uses, const Error& reason);

  Registry& registry_;
  Scheduler& scheduler_;
  Replies& replies_;
  CopyPool& copy_pool_;
  BackgroundPool& background_;
  CompletionQueue& completions_;
  DeviceAccess& devices_;
  Statistics& statistics_;
  Waiting waiting_;
  PlanCache plans_;
  std::vector<std::unique_ptr<Refit>> free_;
  std::vector<std::unique_ptr<Refit>> active_;
};

}  // namespace refit::daemon
