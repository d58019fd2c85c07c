// The bench's engine: holds the target tensors and stands in its gate, or steps. See roles.hpp.
//
// One thread, which alternates between its gate and the orchestrator's commands. Must not touch the
// target's bytes after they were first filled: what is found there was put there by the daemon.
#include <unistd.h>

#include <optional>
#include <refit/engine.hpp>

#include "roles.hpp"

namespace refit::bench {
namespace {

using std::chrono::milliseconds;

class EngineRole final : public Role {
 public:
  explicit EngineRole(Channel channel) : Role(std::move(channel), /*filled_with=*/2) {
    on("gate", [this](Message& command, Reply&) -> Result<void> {
      idle_ = command.body.at("idle").get<bool>();
      step_ = std::chrono::microseconds(command.body.value("step_us", 0));
      return {};
    });
  }

  int run() {
    while (serve(idle_ ? milliseconds(-1) : milliseconds(0))) {
      if (idle_) continue;
      if (auto stood = stand_in_gate(); !stood) {
        report(stood.error());
        idle_ = true;
      }
    }
    return status();
  }

 private:
  Result<std::unique_ptr<Storage>> allocate() override {
    return kind().target(side_of(model().target));
  }
  Result<ModuleSpec> module_in(const Storage& storage, const std::string& name) override {
    return storage.module(name);
  }

  /// A session that just ended may hold the engine's name for a moment longer.
  Result<void> connect(const ConnectOptions& options) override {
    const Deadline patience = Deadline::in(std::chrono::seconds(5));
    while (true) {
      auto engine = Engine::connect(kEngineName, options, Deadline::in(kCallTimeout));
      if (engine) {
        engine_ = std::move(*engine);
        return {};
      }
      if (engine.error().code != Errc::name_taken || patience.passed()) {
        return Unexpected(std::move(engine).error());
      }
      ::usleep(2000);
    }
  }
  void disconnect() override {
    idle_ = true;
    engine_.reset();
  }
  Result<void> register_module(const ModuleSpec& module) override {
    return engine_->register_module(module, Deadline::in(kCallTimeout));
  }
  Result<void> unregister_module(const std::string& module) override {
    return engine_->unregister_module(module, Deadline::in(kCallTimeout));
  }

  /// Some gates, then back to look for a command. While refits come one after the other it stays,
  /// so that no system call of the bench stands between two of them.
  Result<void> stand_in_gate() {
    constexpr auto kLookEvery = milliseconds(200);
    if (step_.count() == 0) {
      while (true) {
        const auto event = engine_->wait(Deadline::in(kLookEvery));
        // A copy that outlasts the deadline: the engine stays where it is.
        if (!event && event.error().code == Errc::deadline) continue;
        if (!event) return Unexpected(event.error());
        if (!*event) return {};
      }
    }
    const auto end = std::chrono::steady_clock::now() + kLookEvery;
    while (std::chrono::steady_clock::now() < end) {
      const auto step_end = std::chrono::steady_clock::now() + step_;
      while (std::chrono::steady_clock::now() < step_end) {
      }
      REFIT_TRY(engine_->poll(Deadline::in(kCallTimeout)));
    }
    return {};
  }

  std::optional<Engine> engine_;
  bool idle_ = true;
  std::chrono::microseconds step_{0};
};

}  // namespace

int run_engine(Channel channel) { return EngineRole(std::move(channel)).run(); }

}  // namespace refit::bench
