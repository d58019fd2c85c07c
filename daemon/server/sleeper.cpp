#include "server/sleeper.hpp"

#include <algorithm>
#include <utility>

namespace refit::daemon {

/// Waits until nobody else touches the engine, as a refit does, and then takes its memory away.
class Sleeper::SleepOperation final : public Operation {
 public:
  explicit SleepOperation(Sleeper& sleeper) : owner(sleeper) {}
  [[nodiscard]] bool exclusive() const noexcept override { return true; }
  [[nodiscard]] bool runnable() const override {
    const auto& modules = engines.front()->modules;
    return std::all_of(modules.begin(), modules.end(), [](const auto& entry) {
      const Registration& registration = *entry.second->registration;
      return registration.populated || registration.asleep;
    });
  }
  void start() override {
    running = true;
    owner.unmap(*this);
  }

  Sleeper& owner;
  std::uint64_t request_id = 0;
  bool running = false;
};

class Sleeper::UnmapJob final : public BackgroundJob {
 public:
  explicit UnmapJob(std::vector<std::shared_ptr<Registration>> given_up)
      : BackgroundJob(1), given_up_(std::move(given_up)) {}
  void run_part(std::size_t) override { given_up_.clear(); }
  void finished() override {}

 private:
  std::vector<std::shared_ptr<Registration>> given_up_;
};

Sleeper::Sleeper(Registry& registry, Scheduler& scheduler, Replies& replies,
                 BackgroundPool& background, CompletionQueue& completions)
    : registry_(registry),
      scheduler_(scheduler),
      replies_(replies),
      background_(background),
      completions_(completions) {}

Sleeper::~Sleeper() = default;

void Sleeper::sleep(Session& session, std::uint64_t request_id) {
  if (session.role != Role::engine) {
    return replies_.send_error(
        session, request_id,
        {Errc::permission, 0, session.label() + " is no engine and cannot sleep", {}});
  }
  const bool was_asleep = std::exchange(session.asleep, true);
  if (!release_engine(session)) {
    session.asleep = was_asleep;
    return replies_.send_error(
        session, request_id,
        {Errc::busy,
         0,
         "engine " + session.name + " is being written; let it through its gate, then sleep",
         {}});
  }
  auto operation = std::make_unique<SleepOperation>(*this);
  operation->request_id = request_id;
  operation->engines.push_back(registry_.find(session.id));
  SleepOperation& admitted = *operation;
  operations_.push_back(std::move(operation));
  scheduler_.enqueue(admitted);
}

void Sleeper::unmap(SleepOperation& operation) {
  Session& engine = *operation.engines.front();
  // A proof may still read it; whoever lets go of it last ends the wait.
  const std::shared_ptr<void> unmapped =
      when_let_go(completions_, [&operation] { operation.owner.finish(operation); });
  std::vector<std::shared_ptr<Registration>> given_up;
  for (const auto& [name, module] : engine.modules) {
    if (module->registration->asleep) continue;
    // Nothing writes it: this operation has the engine alone.
    const bool released = release_module(engine, *module);
    REFIT_ASSERT(released);
    auto left = std::make_shared<Registration>();
    left->manifest = module->registration->manifest;
    left->asleep = true;
    module->registration->awaited = unmapped;
    given_up.push_back(std::exchange(module->registration, std::move(left)));
  }
  background_.submit(std::make_unique<UnmapJob>(std::move(given_up)),
                     BackgroundPool::Priority::first);
}

void Sleeper::finish(SleepOperation& operation) {
  const Session& engine = *operation.engines.front();
  if (const auto asker = registry_.find(engine.id)) replies_.send_ok(*asker, operation.request_id);
  scheduler_.leave(operation);
  remove(operation);
}

void Sleeper::wake(Session& session, std::uint64_t request_id) {
  const auto refuse = [&](const Error& error) { replies_.send_error(session, request_id, error); };
  const bool falling_asleep = std::any_of(
      operations_.begin(), operations_.end(),
      [&](const auto& operation) { return operation->engines.front().get() == &session; });
  if (falling_asleep) {
    return refuse({Errc::busy, 0, "engine " + session.name + " is still falling asleep", {}});
  }
  std::vector<std::string> missing;
  for (const auto& [name, module] : session.modules) {
    if (module->registration->asleep) {
      missing.push_back(session.name + "/" + name + " was not registered again");
    }
  }
  if (!missing.empty()) {
    return refuse({Errc::engine_asleep, 0,
                   "engine " + session.name +
                       " cannot wake: register these modules with the memory that they lie in now, "
                       "or unregister them",
                   std::move(missing)});
  }
  session.asleep = false;
  replies_.send_ok(session, request_id);
}

void Sleeper::on_session_end(Session& session) {
  for (;;) {
    const auto waits =
        std::find_if(operations_.begin(), operations_.end(), [&](const auto& operation) {
          return !operation->running && operation->engines.front().get() == &session;
        });
    if (waits == operations_.end()) return;
    // Withdrawing may start others, so the walk begins anew after each.
    const auto operation = std::move(*waits);
    operations_.erase(waits);
    scheduler_.withdraw(*operation);
  }
}

void Sleeper::remove(SleepOperation& operation) {
  std::erase_if(operations_, [&](const auto& entry) { return entry.get() == &operation; });
}

}  // namespace refit::daemon
