// The bench's engine: holds the target tensors and stands in its gate, or steps. See roles.hpp.
//
// One thread, which alternates between its gate and the orchestrator's commands. Must not touch the
// target's bytes after they were first filled: what is found there was put there by the daemon.
#include <unistd.h>

#include <optional>
#include <refit/engine.hpp>

#include "roles.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

using nlohmann::json;
using std::chrono::milliseconds;

class EngineRole {
 public:
  explicit EngineRole(Channel channel) : channel_(std::move(channel)) {}

  int run() {
    while (!quit_) {
      auto message = channel_.receive(idle_ ? milliseconds(-1) : milliseconds(0));
      if (!message) return 1;
      if (*message && !answer((*message)->body)) return 1;
      if (idle_ || quit_) continue;
      if (auto stood = stand_in_gate(); !stood) {
        gate_error_ = stood.error().to_string();
        idle_ = true;
      }
    }
    return 0;
  }

 private:
  bool answer(const json& command) {
    int fd = -1;
    json reply;
    auto done = handle(command, reply, fd);
    if (done && !gate_error_.empty()) done = fail(Errc::os, "in its gate: " + gate_error_);
    if (!done) reply = error_reply(done.error());
    return channel_.send(reply, fd).has_value();
  }

  Result<void> handle(const json& command, json& reply, int& fd) {
    const std::string name = command.at("command").get<std::string>();
    if (name == "allocate") {
      REFIT_TRY(allocate(command));
      fd = holding_.memory->fd();
      reply["bytes"] = holding_.memory->bytes();
      return {};
    }
    if (name == "connect") return connect(command);
    if (name == "register") return register_module(reply);
    if (name == "register_often") return register_often(command.at("times").get<int>(), reply);
    if (name == "gate") {
      idle_ = command.at("idle").get<bool>();
      step_ = std::chrono::microseconds(command.value("step_us", 0));
      return {};
    }
    if (name == "disconnect") {
      idle_ = true;
      engine_.reset();
      return {};
    }
    if (name == "quit") {
      quit_ = true;
      return {};
    }
    return fail(Errc::bad_argument, "no such command: " + name);
  }

  Result<void> allocate(const json& command) {
    REFIT_TRY_ASSIGN(holding_.model, model_of(command));
    holding_.target.layout = layout_of(holding_.model.target, command.at("cut").get<bool>());
    REFIT_TRY_ASSIGN(holding_.memory,
                     SharedMemory::allocate(holding_.target.layout.bytes, kTensorLabel));
    holding_.target.data = holding_.memory->data();
    fill(holding_.target.data, holding_.target.layout.bytes, /*seed=*/2);
    return {};
  }

  /// A session that just ended may hold the engine's name for a moment longer.
  Result<void> connect(const json& command) {
    REFIT_TRY_ASSIGN(const Waiting waiting, waiting_of(command));
    const ConnectOptions options{command.at("socket").get<std::string>(), waiting};
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

  Result<void> register_module(json& reply) {
    REFIT_TRY_ASSIGN(const ModuleSpec module,
                     module_of(kModuleName, holding_.model, holding_.model.target,
                               holding_.target.layout, holding_.memory));
    Result<void> registered;
    reply["seconds"] = seconds_of(
        [&] { registered = engine_->register_module(module, Deadline::in(kCallTimeout)); });
    return registered;
  }

  /// In memory of their own: no two modules of an engine may share any.
  Result<void> register_often(int times, json& reply) {
    REFIT_TRY_ASSIGN(const auto memory,
                     SharedMemory::allocate(holding_.target.layout.bytes, kTensorLabel));
    Samples samples;
    for (int i = 0; i < times; ++i) {
      const std::string name = "again-" + std::to_string(i);
      REFIT_TRY_ASSIGN(
          const ModuleSpec module,
          module_of(name, holding_.model, holding_.model.target, holding_.target.layout, memory));
      Result<void> registered;
      samples.push_back(seconds_of(
          [&] { registered = engine_->register_module(module, Deadline::in(kCallTimeout)); }));
      REFIT_TRY(registered);
      REFIT_TRY(engine_->unregister_module(name, Deadline::in(kCallTimeout)));
    }
    reply["seconds"] = samples;
    return {};
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

  Channel channel_;
  Holding holding_;
  std::optional<Engine> engine_;
  bool idle_ = true;
  bool quit_ = false;
  std::chrono::microseconds step_{0};
  std::string gate_error_;
};

}  // namespace

int run_engine(Channel channel) { return EngineRole(std::move(channel)).run(); }

}  // namespace refit::bench
