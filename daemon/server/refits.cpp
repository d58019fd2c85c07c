#include "server/refits.hpp"

#include <poll.h>

#include <algorithm>
#include <mutex>

#include "ipc/waiting.hpp"
#include "log.hpp"
#include "server/decode.hpp"
#include "server/several.hpp"
#include "test_point.hpp"

namespace refit::daemon {
namespace {

/// Below this many bytes a copy is shorter than waking a thread for it: the loop thread copies
/// itself.
constexpr std::uint64_t kInlineCopyBytesMax = std::uint64_t{256} << 10;

/// An engine that answered its last gate within this time is read for that long before the loop
/// blocks: a step of a few hundred microseconds ends without a core to wake (some 25 us). It bounds
/// what any other session waits meanwhile.
constexpr std::chrono::microseconds kQuickAnswer{400};

/// Nobody tells this process that another one's device work is done: it asks, at first often.
constexpr std::chrono::microseconds kFirstPause{20};
constexpr std::chrono::microseconds kLongestPause{1000};

float us_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<float, std::micro>(to - from).count();
}

/// True if the engine's process is gone. Its death may still wait in the event queue behind the
/// end of the copy; a copy on the loop thread itself is over before a death could be news, and is
/// not worth a system call.
bool died(const Session& engine, std::uint64_t copied_bytes) {
  if (engine.closed || copied_bytes <= kInlineCopyBytesMax) return engine.closed;
  pollfd entry{engine.pidfd.get(), POLLIN, 0};
  return ::poll(&entry, 1, 0) > 0;
}

}  // namespace

/// One refit under way. Objects are reused, and with them the capacity of everything inside.
class Refits::Refit final : public Operation, public Completion {
 public:
  explicit Refit(Refits& owner_refits) : owner(owner_refits) {
    run = [](Completion& self) {
      auto& refit = static_cast<Refit&>(self);
      refit.owner.copied(refit);
    };
  }

  [[nodiscard]] bool exclusive() const noexcept override { return true; }
  [[nodiscard]] bool runnable() const override {
    return std::all_of(targets.begin(), targets.end(), [](const Target& target) {
      return target.plan->source->populated && target.plan->target->populated;
    });
  }
  void start() override {
    has_engines = true;
    owner.open_gates(*this);
  }

  Refits& owner;
  Phase phase = Phase::idle;
  bool has_engines = false;  ///< the scheduler gave them; leave() gives them back
  std::uint64_t session_id = 0;
  std::uint64_t request_id = 0;
  uid_t uid = 0;
  bool sent_again = false;  ///< the request that is answered came after the writing began
  bool reset_caches = false;
  std::vector<Target> targets;
  Transaction transaction;
  Clock::time_point arrived, started, gated, wrote, deadline;
  std::uint64_t bytes = 0;
  std::uint64_t moved_bytes_max = 0;  ///< with every layer resident
  std::uint64_t device_bytes = 0;     ///< of the layers that are, once the engine holds still
  std::uint32_t tensors = 0;
  bool engines_ready = false;              ///< all of them, at some time
  const Registration* works_on = nullptr;  ///< whose device work is not done, if any was seen
  Clock::time_point look_again{Clock::time_point::max()};
  std::chrono::microseconds pause{kFirstPause};  ///< before the look after the next one
  std::vector<DeviceJob*> device_jobs;           ///< of write() alone, which keeps its memory

  // Shared with pool threads.
  std::atomic<std::size_t> jobs_left{0};
  std::atomic<bool> faulted{false};
  std::atomic<bool> touched{false};  ///< a byte of a target may have been written

  /// Keeps the first failure, or the first that only another process mends.
  void note(const DeviceOutcome& outcome) noexcept {
    const std::lock_guard lock(outcome_mutex_);
    if (outcome_.code == 0 || (outcome.sticky && !outcome_.sticky)) outcome_ = outcome;
  }
  DeviceOutcome device_outcome() noexcept {
    const std::lock_guard lock(outcome_mutex_);
    return outcome_;
  }
  void forget_outcome() noexcept {
    const std::lock_guard lock(outcome_mutex_);
    outcome_ = {};
  }

 private:
  std::mutex outcome_mutex_;
  DeviceOutcome outcome_;
};

/// What a plan needs of devices, made once. Keeps the plan, and so the memory at both of its ends.
class Refits::Preparation final : public BackgroundJob {
 public:
  Preparation(Refits& owner, std::shared_ptr<BoundPlan> plan)
      : BackgroundJob(1), owner_(owner), plan_(std::move(plan)) {}
  void run_part(std::size_t) override { job_ = plan_->prepare(owner_.devices_); }
  void finished() override { owner_.prepared(*plan_, std::move(job_)); }

 private:
  Refits& owner_;
  const std::shared_ptr<BoundPlan> plan_;
  Result<std::unique_ptr<DeviceJob>> job_;
};

Refits::Refits(Registry& registry, Scheduler& scheduler, Replies& replies, CopyPool& copy_pool,
               BackgroundPool& background, CompletionQueue& completions, DeviceAccess& devices,
               Statistics& statistics, Waiting waiting)
    : registry_(registry),
      scheduler_(scheduler),
      replies_(replies),
      copy_pool_(copy_pool),
      background_(background),
      completions_(completions),
      devices_(devices),
      statistics_(statistics),
      waiting_(waiting) {
  active_.reserve(64);
  free_.reserve(64);
}

Refits::~Refits() = default;

Refits::Refit& Refits::take_free() {
  if (free_.empty()) free_.push_back(std::make_unique<Refit>(*this));
  active_.push_back(std::move(free_.back()));
  free_.pop_back();
  return *active_.back();
}

void Refits::retire(Refit& refit) {
  refit.phase = Phase::idle;
  refit.forget_outcome();
  refit.has_engines = false;
  refit.targets.clear();
  refit.engines.clear();
  const auto found = std::find_if(active_.begin(), active_.end(),
                                  [&](const auto& entry) { return entry.get() == &refit; });
  REFIT_ASSERT(found != active_.end());
  free_.push_back(std::move(*found));
  *found = std::move(active_.back());
  active_.pop_back();
}

// ---- request

void Refits::begin(Session& trainer, std::uint64_t request_id, const wire::Refit& message,
                   Clock::time_point arrived) {
  if (Refit* running = find_writing(trainer, message))
    return answer_instead(*running, trainer, request_id);
  Refit& refit = take_free();
  refit.session_id = trainer.id;
  refit.uid = trainer.peer.uid;
  refit.sent_again = false;
  refit.request_id = request_id;
  refit.reset_caches = message.reset_caches();
  refit.arrived = arrived;
  refit.deadline = deadline_after(arrived, message.deadline_us());
  refit.transaction.reset(from_wire(message.transaction()));
  refit.engines_ready = false;
  refit.works_on = nullptr;
  refit.look_again = Clock::time_point::max();
  refit.pause = kFirstPause;
  refit.jobs_left.store(0);
  refit.faulted.store(false);
  refit.touched.store(false);

  auto resolved = resolve(refit, trainer, message);
  if (!resolved) {
    statistics_.failed(resolved.error().code);
    replies_.send_error(trainer, request_id, resolved.error());
    return retire(refit);
  }
  refit.phase = Phase::queued;
  scheduler_.enqueue(refit);
}

/// The refit that writes this very transaction, for an earlier request. To refuse this one would
/// say that nothing is changed, and its trainer would change the source under the copy.
Refits::Refit* Refits::find_writing(const Session& trainer, const wire::Refit& message) {
  if (test_point("refits.sent_again")) return nullptr;
  const TransactionId id = from_wire(message.transaction());
  for (const auto& refit : active_) {
    if (refit->phase == Phase::writing && refit->transaction.id() == id &&
        refit->uid == trainer.peer.uid && same_targets(*refit, message.targets()))
      return refit.get();
  }
  return nullptr;
}

bool Refits::same_targets(const Refit& refit,
                          const flatbuffers::Vector<flatbuffers::Offset<wire::Target>>* wanted) {
  if (wanted == nullptr || wanted->size() != refit.targets.size()) return false;
  return std::equal(wanted->begin(), wanted->end(), refit.targets.begin(),
                    [&](const wire::Target* one, const Target& target) {
                      return refit.engines[target.engine]->name == view(one->engine()) &&
                             target.module->name == view(one->module_name()) &&
                             same_selection(target.plan->options.selection, one->selection());
                    });
}

/// The outcome goes to the newer request; the older one was given up by its client.
void Refits::answer_instead(Refit& running, Session& trainer, std::uint64_t request_id) {
  if (const auto asked_before = registry_.find(running.session_id)) {
    replies_.send_error(*asked_before, running.request_id,
                        {Errc::busy,
                         0,
                         "the transaction was sent again while it was written; the "
                         "newer request is answered",
                         {}});
  }
  running.session_id = trainer.id;
  running.request_id = request_id;
  running.sent_again = true;
}

/// Names become engines, modules and plans; everything that can be wrong is found here, before
/// anything is asked of an engine.
Result<void> Refits::resolve(Refit& refit, Session& trainer, const wire::Refit& message) {
  if (trainer.role != Role::trainer)
    return fail(Errc::permission, trainer.label() + " is no trainer and may not refit");
  if (refit.transaction.id().is_zero())
    return fail(Errc::bad_argument, "a refit needs a transaction id that is not zero");
  if (message.staging() != wire::Staging::direct) {
    return fail(Errc::unsupported, "staging `shadow` is not built; use `direct`");
  }
  const auto* targets = message.targets();
  if (targets == nullptr || targets->size() == 0)
    return fail(Errc::bad_argument, "a refit needs at least one target");
  if (targets->size() > kModulesMax)
    return fail(Errc::quota, "a refit takes at most " + std::to_string(kModulesMax) + " targets");

  refit.bytes = 0;
  refit.moved_bytes_max = 0;
  refit.device_bytes = 0;
  refit.tensors = 0;
  std::vector<Error> problems;
  for (const auto* wanted : *targets) {
    auto resolved = resolve_target(refit, trainer, *wanted);
    if (!resolved) problems.push_back(std::move(resolved).error());
  }
  if (problems.empty()) return {};
  return several(std::move(problems));
}

Result<void> Refits::resolve_target(Refit& refit, Session& trainer, const wire::Target& wanted) {
  REFIT_TRY_ASSIGN(auto engine, registry_.awake_engine_for(trainer, view(wanted.engine())));
  REFIT_TRY_ASSIGN(auto module, registry_.module_of(*engine, view(wanted.module_name())));
  REFIT_TRY_ASSIGN(auto source, registry_.module_of(trainer, view(wanted.source())));
  REFIT_TRY_ASSIGN(auto plan, plans_.get(source->registration, module->registration,
                                         wanted.selection(), wanted.allow_unmatched()));
  REFIT_TRY_ASSIGN(auto expected, Expected::of(*plan, wanted));
  for (const Target& other : refit.targets) {
    if (other.module == module)
      return fail(Errc::bad_argument, engine->name + "/" + module->name + " is named twice");
  }
  refit.bytes += plan->plan.bytes;
  refit.moved_bytes_max += plan->plan.bytes + plan->plan.layer_bytes;
  refit.tensors += static_cast<std::uint32_t>(plan->plan.targets.size());
  // Engines in name order: two transactions over the same engines never wait for each other
  // crosswise.
  auto place = std::lower_bound(refit.engines.begin(), refit.engines.end(), engine,
                                [](const auto& a, const auto& b) { return a->name < b->name; });
  const auto index = static_cast<std::size_t>(place - refit.engines.begin());
  if (place == refit.engines.end() || *place != engine) {
    for (Target& other : refit.targets) other.engine += other.engine >= index ? 1 : 0;
    refit.engines.insert(place, engine);
  }
  refit.targets.push_back({index, std::move(module), std::move(plan), std::move(expected)});
  return {};
}

/// The recorded outcome of a transaction that was committed before: only if every target is whole
/// and vouches for it itself, so that an engine that started anew or was broken since is written
/// again.
bool Refits::replay(Refit& refit) {
  std::uint64_t version = 0;
  for (const Target& target : refit.targets) {
    const ModuleReading reading = read_module(block_of(refit, target));
    if (reading.word.state != ModuleState::committed) return false;
    const Committed wanted{refit.transaction.id(), target.plan->selection_hash, 0};
    const Committed last{reading.transaction, reading.selection, reading.version};
    const auto& recent = target.module->recent;
    const auto found = std::find(recent.begin(), recent.end(), wanted);
    if (found == recent.end() && !(last == wanted)) return false;
    version = std::max(version, found == recent.end() ? last.version : found->version);
  }
  if (const auto trainer = registry_.find(refit.session_id)) {
    auto& fbb = replies_.builder();
    const wire::Phases phases(0, 0, 0, 0, us_between(refit.arrived, Clock::now()));
    replies_.send(*trainer, refit.request_id, wire::Body::Refitted,
                  wire::CreateRefitted(fbb, version, refit.bytes, refit.tensors,
                                       static_cast<std::uint8_t>(Guarantee::atomic), &phases, true)
                      .Union());
  }
  return true;
}

ModuleBlock& Refits::block_of(const Refit& refit, const Target& target) {
  return refit.engines[target.engine]->memory->response_region().modules[target.module->slot];
}

// ---- gate

/// A module whose bytes may be a mix takes only what makes all of it whole: every tensor, or the
/// transaction that broke it with the tensors that it wrote then.
Result<void> Refits::check_poison(const Refit& refit) const {
  for (const Target& target : refit.targets) {
    const ModuleReading reading = read_module(block_of(refit, target));
    if (reading.word.state != ModuleState::poisoned || target.plan->plan.whole) continue;
    if (reading.transaction == refit.transaction.id() &&
        reading.selection == target.plan->selection_hash) {
      continue;
    }
    return fail(Errc::poisoned, refit.engines[target.engine]->name + "/" + target.module->name +
                                    " is poisoned by transaction " +
                                    reading.transaction.to_string() +
                                    ": refit all of its tensors, or send that transaction again");
  }
  return {};
}

void Refits::open_gates(Refit& refit) {
  refit.started = Clock::now();
  // Looked at only now: the same transaction may have been committed while this one waited its
  // turn.
  if (replay(refit)) return release_engines(refit);
  if (auto allowed = check_poison(refit); !allowed) return fail_refit(refit, allowed.error());
  if (!plans_are_ready(refit)) return;
  refit.phase = Phase::gating;
  for (const auto& engine : refit.engines) {
    refit.transaction.add_engine({&engine->memory->response_region().gate,
                                  &engine->memory->request_region().gate_answer,
                                  &engine->gate_epoch});
  }
  for (const Target& target : refit.targets) {
    ModuleBlock& block = block_of(refit, target);
    refit.transaction.add_module(target.engine, block, read_module(block).version + 1,
                                 target.plan->selection_hash);
  }
  const std::uint8_t flags = static_cast<std::uint8_t>(
      (refit.moved_bytes_max > kInlineCopyBytesMax ? GateWord::kLongCopy : 0) |
      (refit.reset_caches ? GateWord::kResetCaches : 0));
  refit.transaction.prepare(flags);
  wake_engines(refit);
  if (refit.moved_bytes_max <= kInlineCopyBytesMax) prefetch(refit);
  wait_briefly(refit);
}

/// If not, what they lack is made in the background, after which open_gates() is called again. The
/// engines are the refit's own meanwhile and are not asked for anything.
bool Refits::plans_are_ready(Refit& refit) {
  bool ready = true;
  for (const Target& target : refit.targets) {
    BoundPlan& plan = *target.plan;
    if (plan.ready()) continue;
    ready = false;
    if (!std::exchange(plan.being_prepared, true)) {
      background_.submit(std::make_unique<Preparation>(*this, target.plan),
                         BackgroundPool::Priority::first);
    }
  }
  if (!ready) refit.phase = Phase::preparing;
  return ready;
}

/// Of a plan whose refit is gone, too. One that fails may start another that has it prepared anew.
void Refits::prepared(BoundPlan& plan, Result<std::unique_ptr<DeviceJob>> job) {
  plan.being_prepared = false;
  plan.prepared = job.has_value();
  if (job) plan.device_job = std::move(*job);
  const auto goes_on = [&](const Refit& refit) {
    bool uses = false;
    bool waits = false;
    for (const Target& target : refit.targets) {
      uses = uses || target.plan.get() == &plan;
      waits = waits || target.plan->being_prepared;
    }
    return refit.phase == Phase::preparing && uses && !plan.being_prepared && !(job && waits);
  };
  while (Refit* refit = find_waiting(goes_on)) {
    if (job) {
      open_gates(*refit);
    } else {
      fail_refit(*refit, job.error());
    }
  }
  if (!job) devices_.judge(job.error());
}

/// Many tiny tensors cost a cache miss on both sides each; while the engine finishes its step they
/// cost nothing.
void Refits::prefetch(const Refit& refit) {
  for (const Target& target : refit.targets) {
    for (const CopyOp& op : target.plan->ops) {
      __builtin_prefetch(op.source);
      __builtin_prefetch(op.target, 1);
    }
  }
}

/// Reads for the engines' answers before blocking, where they were quick the last time.
void Refits::wait_briefly(Refit& refit) {
  const bool quick =
      std::all_of(refit.engines.begin(), refit.engines.end(),
                  [](const auto& engine) { return engine->last_gate_us < kQuickAnswer.count(); });
  if (waiting_ != Waiting::adaptive || !quick) return;
  for (const auto& engine : refit.engines) engine->memory->response_region().daemon_awake.store(1);
  spin_briefly([&] { return refit.transaction.readiness() != Transaction::Readiness::waiting; },
               kQuickAnswer);
  // From here on an engine rings again. An answer that fell between the last look and this store is
  // looked for below.
  for (const auto& engine : refit.engines) {
    engine->memory->response_region().daemon_awake.store(0);
    // A request that came meanwhile was not rung for either.
    if (engine->has_request()) engine->ring_myself();
  }
  on_readiness(refit);
}

void Refits::on_engine_answer(Session& engine) {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    Refit& refit = *active_[i];
    if (refit.phase != Phase::gating) continue;
    if (std::none_of(refit.engines.begin(), refit.engines.end(),
                     [&](const auto& one) { return one.get() == &engine; }))
      continue;
    return on_readiness(refit);
  }
}

void Refits::on_readiness(Refit& refit) {
  if (refit.phase != Phase::gating) return;
  switch (refit.transaction.readiness()) {
    case Transaction::Readiness::waiting:
      return;
    case Transaction::Readiness::withdrawn:
      break;
    case Transaction::Readiness::all_ready:
      refit.gated = Clock::now();
      if (!std::exchange(refit.engines_ready, true)) {
        for (const auto& engine : refit.engines) {
          engine->last_gate_us = us_between(refit.started, refit.gated);
        }
      }
      // Nobody waits for a refit whose time is over: its trainer may be changing the source
      // already.
      if (refit.gated >= refit.deadline || abandoned(refit)) return fail_late(refit);
      if (const auto done = work_is_done(refit); !done) {
        fail_refit(refit, done.error());
        return devices_.judge(done.error());
      } else if (!*done) {
        refit.look_again = refit.gated + refit.pause;
        refit.pause = std::min(2 * refit.pause, kLongestPause);
        return;
      }
      if (auto settled = settle(refit); !settled) return fail_refit(refit, settled.error());
      if (refit.transaction.begin_writing()) return write(refit);
  }
  std::string who;
  for (std::size_t i = 0; i < refit.engines.size(); ++i) {
    if (refit.transaction.withdrawn(i)) who += (who.empty() ? "" : ", ") + refit.engines[i]->name;
  }
  fail_refit(refit, {Errc::engine_not_ready,
                     0,
                     "engine " + who + " stepped back from its gate; nothing was changed",
                     {}});
}

/// Whether the device work is done that the refit comes after: the trainer's on the source, the
/// engines' on the targets. There is no taking back a copy that waits for it on a stream, so an
/// event of a process that hangs would hold engines in `writing` for ever: it is asked for before.
/// Asking takes the driver a microsecond or two; it waits for nothing.
Result<bool> Refits::work_is_done(Refit& refit) const {
  for (const Target& target : refit.targets) {
    if (!target.plan->touches_devices) continue;
    const auto done = [&](const Registration& side, const char* fence) -> Result<bool> {
      if (side.event == nullptr || test_point(fence)) return true;
      REFIT_TRY_ASSIGN(const bool passed, side.event->passed());
      if (!passed) refit.works_on = &side;
      return passed;
    };
    REFIT_TRY_ASSIGN(const bool source, done(*target.plan->source, "fence.source"));
    if (!source) return false;
    REFIT_TRY_ASSIGN(const bool engine, done(*target.plan->target, "fence.engine"));
    if (!engine) return false;
  }
  refit.works_on = nullptr;
  return true;
}

/// The client gave this request up. It says so before its call returns, so a source byte that it
/// changes afterwards is changed after this word.
bool Refits::abandoned(const Refit& refit) const {
  const auto trainer = registry_.find(refit.session_id);
  return trainer == nullptr ||
         trainer->memory->request_region().abandoned_request.load() >= refit.request_id;
}

void Refits::fail_late(Refit& refit) {
  std::string who;
  for (std::size_t i = 0; i < refit.engines.size() && refit.phase != Phase::preparing; ++i) {
    if (refit.phase == Phase::queued || !refit.transaction.ready(i)) {
      who += (who.empty() ? "" : ", ") + refit.engines[i]->name;
    }
  }
  std::string what = "the deadline passed before the copy began";
  if (refit.phase == Phase::queued) {
    what = "engine " + who + " was busy with another refit, a check or populating pages";
  } else if (refit.phase == Phase::preparing) {
    what =
        "the driver did not make the copies of a new plan in time: it hangs, compiles kernels, or "
        "digests of other engines take all background threads";
  } else if (!who.empty()) {
    what = "engine " + who + " did not reach its gate in time";
  } else if (refit.works_on != nullptr) {
    what = "the device work that the fence of " + refit.works_on->manifest->label() +
           " stands for was not done in time: its process hangs, or needs a longer deadline";
  }
  fail_refit(refit, {Errc::engine_not_ready, 0, what + "; nothing was changed", {}});
}

/// Where the engines' layers are, which they say before they answer ready and keep until they are
/// let go. An engine that steps back after this is seen by begin_writing.
Result<void> Refits::settle(Refit& refit) {
  refit.device_bytes = 0;
  for (const Target& target : refit.targets) {
    REFIT_TRY(target.plan->settle(refit.engines[target.engine]->memory->request_region()));
    refit.device_bytes += target.plan->device_bytes;
  }
  return {};
}

// ---- writing

void Refits::write(Refit& refit) {
  refit.phase = Phase::writing;
  refit.look_again = Clock::time_point::max();
  test_point("writing.begun");
#ifdef REFIT_TEST_POINTS
  // Half of the bytes first, so that a death at this point leaves a real mix.
  for (const Target& target : refit.targets) {
    refit.touched.store(refit.touched.load() || !target.plan->ops.empty());
    [[maybe_unused]] const CopyOutcome half =
        copy_inline(target.plan->ops.data(), (target.plan->ops.size() + 1) / 2);
  }
  test_point("writing.half");
#endif
  const bool on_host = std::none_of(refit.targets.begin(), refit.targets.end(),
                                    [](const Target& one) { return one.plan->touches_devices; });
  if (on_host && refit.moved_bytes_max <= kInlineCopyBytesMax) {
    refit.touched.store(true);
    for (const Target& target : refit.targets) {
      BoundPlan& plan = *target.plan;
      const auto copy = [&](const CopyOp* ops, std::size_t count) {
        if (copy_inline(ops, count).status != CopyStatus::ok) refit.faulted.store(true);
      };
      copy(plan.ops.data(), plan.ops.size());
      for (const LayerCopies& layer : plan.layers) {
        if (layer.resident) copy(plan.layer_ops.data() + layer.first, layer.count);
      }
    }
    return copied(refit);
  }
  // One more than there are, so that the last of them cannot end before all are submitted.
  refit.jobs_left.store(1);
  const auto submit = [&](CopyJob& job) {
    refit.touched.store(true);
    refit.jobs_left.fetch_add(1);
    job.on_done(
        [](void* context, CopyOutcome outcome) {
          auto& self = *static_cast<Refit*>(context);
          test_point("copy.ended");
          if (outcome.status != CopyStatus::ok) self.faulted.store(true);
          self.owner.job_done(self);
        },
        &refit);
    copy_pool_.submit(job);
  };
  refit.device_jobs.clear();
  const auto submit_to_device = [&](const BoundPlan& plan, DeviceJob& job) {
    refit.jobs_left.fetch_add(1);
    refit.device_jobs.push_back(&job);
    job.arm(
        plan.source->event.get(), plan.target->event.get(),
        [](void* context, DeviceOutcome outcome) {
          auto& self = *static_cast<Refit*>(context);
          test_point("device_copy.ended");
          if (!outcome.untouched) self.touched.store(true);
          if (outcome.code != 0) self.note(outcome);
          self.owner.job_done(self);
        },
        &refit);
  };
  for (const Target& target : refit.targets) {
    BoundPlan& plan = *target.plan;
    if (!plan.ops.empty()) submit(plan.job);
    if (plan.device_job != nullptr && !plan.device_job->idle())
      submit_to_device(plan, *plan.device_job);
    for (LayerCopies& layer : plan.layers) {
      if (layer.resident) submit(layer.job);
    }
  }
  if (!refit.device_jobs.empty()) devices_.known()->submit(refit.device_jobs);
  job_done(refit);
}

/// Any pool thread, and the loop once.
void Refits::job_done(Refit& refit) {
  if (refit.jobs_left.fetch_sub(1) == 1) completions_.push(refit);
}

/// Every byte is there, or the memory faulted.
void Refits::copied(Refit& refit) {
  refit.wrote = Clock::now();
  test_point("writing.done");
  const DeviceOutcome device = refit.device_outcome();
  if (refit.faulted.load() || device.code != 0) return broken(refit, device);
  refit.transaction.commit();
  test_point("transaction.committed");
  refit.transaction.release();
  wake_engines(refit);
  reply(refit);
}

/// Some bytes are there and some are not; or none is, where the devices failed before the first.
void Refits::broken(Refit& refit, const DeviceOutcome& device) {
  const bool touched = refit.touched.load();
  if (touched) {
    refit.transaction.poison();
  } else {
    refit.transaction.undo();
  }
  refit.transaction.release();
  wake_engines(refit);
  Error error{Errc::memory_fault, 0, refit.targets.front().plan->target->manifest->label(), {}};
  if (device.code != 0) {
    error.code = Errc::cuda;
    error.native = device.code;
    error.message += ": the copy on the device failed (" + std::string(device.call) + " answered " +
                     std::to_string(device.code) + ")";
  } else {
    error.message += ": client memory faulted (SIGBUS) while it was copied";
  }
  error.message +=
      touched ? "; the target is poisoned until a refit commits" : "; nothing was changed";
  LogFields fields = fields_of(*refit.engines.front());
  fields.module = refit.targets.front().module->name;
  fields.transaction = refit.transaction.id().to_string();
  fields.errc = error.code;
  fields.native = error.native;
  log(LogEvent::memory_faulted, error.message, fields);
  fail_refit(refit, error);
  // The engine knows before this process ends.
  if (device.sticky) devices_.lost(error);
}

void Refits::wake_engines(Refit& refit) {
  // Also those whose session ended meanwhile: an engine that lives still waits for this word.
  for (const auto& engine : refit.engines) engine->wake_client();
}

// ---- reply

void Refits::reply(Refit& refit) {
  const auto now = Clock::now();
  const PhaseTimes times{us_between(refit.arrived, refit.started),
                         us_between(refit.started, refit.gated),
                         us_between(refit.gated, refit.wrote), 0, us_between(refit.arrived, now)};
  std::uint64_t version = 0;
  const Session* lost = nullptr;
  for (const Target& target : refit.targets) {
    const Session& engine = *refit.engines[target.engine];
    if (died(engine, refit.moved_bytes_max)) lost = &engine;
    const std::uint64_t committed = read_module(block_of(refit, target)).version;
    version = std::max(version, committed);
    Module& module = *target.module;
    module.recent[module.refits % module.recent.size()] = {refit.transaction.id(),
                                                           target.plan->selection_hash, committed};
    ++module.refits;
    module.last = times;
    module.last_bytes = target.plan->plan.bytes;
    module.last_source = target.plan->source->manifest->label();
  }
  if (lost != nullptr) {
    return fail_refit(
        refit, {Errc::engine_gone,
                0,
                "engine " + lost->name + " died while it was written" +
                    (refit.engines.size() > 1 ? "; the other engines hold the new weights" : ""),
                {}});
  }
  statistics_.committed(times, refit.bytes);
  const bool all_stay =
      std::all_of(refit.targets.begin(), refit.targets.end(),
                  [](const Target& one) { return one.plan->source->outlives_its_client(); });
  const auto guarantee = all_stay ? Guarantee::atomic : Guarantee::poisoned_on_failure;
  if (const auto trainer = registry_.find(refit.session_id)) {
    auto& fbb = replies_.builder();
    const wire::Phases phases(times.wait_us, times.gate_us, times.copy_us, times.check_us,
                              times.total_us);
    replies_.send(*trainer, refit.request_id, wire::Body::Refitted,
                  wire::CreateRefitted(fbb, version, refit.bytes, refit.tensors,
                                       static_cast<std::uint8_t>(guarantee), &phases,
                                       refit.sent_again, refit.device_bytes)
                      .Union());
  }
  if (on_commit) {
    for (const Target& target : refit.targets)
      on_commit(*refit.engines[target.engine], target.module, target.plan, target.expected);
  }
  release_engines(refit);
}

/// Answers with `error` and lets the engines go. Whoever calls has settled the words.
void Refits::fail_refit(Refit& refit, const Error& error) {
  statistics_.failed(error.code);
  if (refit.phase == Phase::gating) {
    refit.transaction.release();
    wake_engines(refit);
  }
  // "Nothing was changed" is no answer where an earlier request committed the transaction.
  const bool replayed = error.code == Errc::engine_not_ready && replay(refit);
  if (const auto trainer = registry_.find(refit.session_id); trainer != nullptr && !replayed)
    replies_.send_error(*trainer, refit.request_id, error);
  release_engines(refit);
}

/// The last act of every refit that reached the queue. What waits for its engines may start in
/// here.
void Refits::release_engines(Refit& refit) {
  const bool had_engines = refit.has_engines;
  refit.has_engines = false;
  refit.phase = Phase::idle;
  if (had_engines) {
    scheduler_.leave(refit);
  } else {
    scheduler_.withdraw(refit);
  }
  retire(refit);
}

// ---- what happens to others

/// Failing one refit may start or end others, so every walk begins anew after each.
template <typename Predicate>
Refits::Refit* Refits::find_waiting(Predicate&& matches) {
  for (const auto& refit : active_) {
    const bool waits = refit->phase != Phase::idle && refit->phase != Phase::writing;
    if (waits && matches(*refit)) return refit.get();
  }
  return nullptr;
}

void Refits::on_session_end(Session& session) {
  const auto uses_engine = [&](const Refit& refit) {
    return std::any_of(refit.engines.begin(), refit.engines.end(),
                       [&](const auto& one) { return one.get() == &session; });
  };
  while (Refit* refit = find_waiting(uses_engine)) {
    fail_refit(*refit,
               {Errc::engine_gone, 0, session.label() + " is gone; nothing was changed", {}});
  }
  while (Refit* refit =
             find_waiting([&](const Refit& one) { return one.session_id == session.id; })) {
    fail_refit(*refit, {Errc::daemon_gone, 0, "the trainer is gone", {}});
  }
  for (const auto& [name, module] : session.modules)
    plans_.forget(module->registration->generation);
}

/// Calls off what waits and `uses` something that goes away. False if one writes it, also one that
/// has started in here: a refit that fails lets the next one go, and its engine may answer at once.
template <typename Predicate>
bool Refits::call_off(Predicate&& uses, const Error& reason) {
  bool looked = false;
  for (;;) {
    const bool being_written = std::any_of(active_.begin(), active_.end(), [&](const auto& refit) {
      return refit->phase == Phase::writing && uses(*refit);
    });
    if (being_written && !(looked && test_point("refits.one_look_at_a_registration"))) return false;
    Refit* refit = find_waiting(uses);
    if (refit == nullptr) return true;
    fail_refit(*refit, reason);
    looked = true;
  }
}

bool Refits::on_registration_end(Session& session, Module& module) {
  const auto uses = [&](const Refit& refit) {
    return std::any_of(refit.targets.begin(), refit.targets.end(), [&](const Target& target) {
      return target.plan->source == module.registration ||
             target.plan->target == module.registration;
    });
  };
  const Error reason{Errc::engine_not_ready,
                     0,
                     session.name + "/" + module.name +
                         " was registered anew while the refit waited; nothing was changed",
                     {}};
  if (!call_off(uses, reason)) return false;
  plans_.forget(module.registration->generation);
  return true;
}

bool Refits::on_engine_sleep(Session& engine) {
  const auto uses = [&](const Refit& refit) {
    return std::any_of(refit.engines.begin(), refit.engines.end(),
                       [&](const auto& one) { return one.get() == &engine; });
  };
  return call_off(uses, asleep_error(engine));
}

Clock::time_point Refits::next_deadline() const {
  auto next = Clock::time_point::max();
  for (const auto& refit : active_) {
    if (refit->phase == Phase::writing) continue;
    next = std::min({next, refit->deadline, refit->look_again});
  }
  return next;
}

Clock::time_point Refits::on_time(Clock::time_point now) {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    if (now < active_[i]->look_again) continue;
    active_[i]->look_again = Clock::time_point::max();
    on_readiness(*active_[i]);
  }
  while (Refit* late = find_waiting([now](const Refit& one) { return now >= one.deadline; })) {
    fail_late(*late);
  }
  return next_deadline();
}

void Refits::poll_gates() {
  for (std::size_t i = 0; i < active_.size(); ++i) {
    if (active_[i]->phase == Phase::gating) on_readiness(*active_[i]);
  }
}

void Refits::cancel_waiting(const Error& reason) {
  while (Refit* refit = find_waiting([](const Refit&) { return true; })) fail_refit(*refit, reason);
}

}  // namespace refit::daemon
