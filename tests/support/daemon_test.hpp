// DaemonTest: a private socket and a daemon on it, with trainers and engines of the test's own
// process.
//
// One thread but where a helper says otherwise. The daemon is started by the test, because most
// tests here want it armed.
#pragma once

#include <gtest/gtest.h>
#include <poll.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "refit/engine.hpp"
#include "refit/observer.hpp"
#include "refit/trainer.hpp"
#include "support/daemon_process.hpp"
#include "support/eventually.hpp"
#include "support/model.hpp"
#include "support/shapes.hpp"

namespace refit::test {

inline const RefitTarget kWhole{"flux", "transformer"};
inline constexpr std::uint64_t kOldSeed = 70;
inline constexpr std::uint64_t kNewSeed = 71;

class DaemonTest : public ::testing::Test {
 protected:
  static Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }
  [[nodiscard]] ConnectOptions options() const { return {socket_, Waiting::adaptive, reconnect_}; }

  DaemonProcess& start(const DaemonOptions& how = {}) {
    daemon_.reset();
    daemon_ = std::make_unique<DaemonProcess>(socket_, how);
    return *daemon_;
  }
  /// The test build with REFIT_POINT=`point`.
  DaemonProcess& start_armed(const std::string& point) {
    DaemonOptions how;
    how.test_build = true;
    how.point = point;
    return start(how);
  }

  Trainer connect_trainer() { return must(Trainer::connect("trainer", options(), soon())); }
  Trainer make_trainer(Model& model) {
    Trainer trainer = connect_trainer();
    must(trainer.register_module(model.spec(), soon()));
    return trainer;
  }
  Engine make_engine(const std::string& name, Model& model) {
    Engine engine = must(Engine::connect(name, options(), soon()));
    must(engine.register_module(model.spec(), soon()));
    return engine;
  }

  /// A model with known old bytes.
  static std::unique_ptr<Model> model_of(const std::vector<TensorShape>& tensors,
                                         std::uint64_t seed,
                                         const std::string& module = "transformer") {
    auto model = std::make_unique<Model>(module, tensors);
    model->fill(seed);
    return model;
  }

  /// How many of `target`'s tensors hold `source`'s bytes.
  static std::size_t equal_tensors(const Model& target, const Model& source) {
    std::size_t count = 0;
    for (std::size_t i = 0; i < target.names().size(); ++i)
      count += target.tensor_equals(source, i);
    return count;
  }
  /// Some tensors are new, some are old: what no step may ever see.
  static bool is_mix(const Model& target, const Model& old_bytes, const Model& new_bytes) {
    return equal_tensors(target, new_bytes) > 0 && equal_tensors(target, old_bytes) > 0 &&
           !target.equals(new_bytes) && !target.equals(old_bytes);
  }

  /// Polls until the daemon has asked and let through, or something went wrong.
  static Result<GateEvent> poll_until_event(Engine& engine, Deadline deadline) {
    for (;;) {
      REFIT_TRY_ASSIGN(std::optional<GateEvent> event, engine.poll(deadline));
      if (event) return *event;
      if (deadline.passed()) return fail(Errc::deadline, "the test saw no gate event");
      std::this_thread::yield();
    }
  }

  /// Waits until `engine`, which another thread polls, holds still at its gate: then the refit's
  /// question has gone out to every engine of it.
  static bool holds(const Engine& engine) {
    return eventually([&] { return !engine.step_allowed(); });
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  std::unique_ptr<DaemonProcess> daemon_;
  bool reconnect_ = true;  ///< of the clients that are made from now on
};

/// A refit on a thread of its own; its end is awaited by outcome().
class BackgroundRefit {
 public:
  BackgroundRefit(Trainer& trainer, std::vector<RefitTarget> targets, Deadline deadline,
                  TransactionId id = TransactionId::random())
      : thread_([this, &trainer, targets = std::move(targets), deadline, id] {
          RefitOptions options;
          options.transaction = id;
          outcome_.emplace(trainer.refit_all(targets, deadline, options));
        }) {}
  ~BackgroundRefit() {
    if (thread_.joinable()) thread_.join();
  }
  BackgroundRefit(const BackgroundRefit&) = delete;
  BackgroundRefit& operator=(const BackgroundRefit&) = delete;

  const Result<RefitReport>& outcome() {
    if (thread_.joinable()) thread_.join();
    return *outcome_;
  }

 private:
  std::optional<Result<RefitReport>> outcome_;
  std::thread thread_;
};

/// An engine that waits at its gate on a thread of its own, until the event or an error.
class BackgroundGate {
 public:
  BackgroundGate(Engine& engine, Deadline deadline)
      : thread_([this, &engine, deadline] {
          for (;;) {
            auto event = engine.poll(deadline);
            if (event && !*event && !deadline.passed() && !stop_.load()) {
              std::this_thread::yield();
              continue;
            }
            outcome_.emplace(std::move(event));
            return;
          }
        }) {}
  ~BackgroundGate() {
    if (thread_.joinable()) thread_.join();
  }
  BackgroundGate(const BackgroundGate&) = delete;
  BackgroundGate& operator=(const BackgroundGate&) = delete;

  const Result<std::optional<GateEvent>>& outcome() {
    if (thread_.joinable()) thread_.join();
    return *outcome_;
  }
  /// Ends it without an event, once what it holds for has let it go.
  const Result<std::optional<GateEvent>>& end() {
    stop_.store(true);
    return outcome();
  }
  /// The version that the first module of the event got; 0 without an event.
  std::uint64_t version() {
    return outcome() && *outcome() ? (*outcome())->modules.front().version : 0;
  }

 private:
  std::atomic<bool> stop_{false};
  std::optional<Result<std::optional<GateEvent>>> outcome_;
  std::thread thread_;
};

/// Ok, or the error's code: what assertions compare.
template <typename T>
Errc code_of(const Result<T>& result) {
  return result ? Errc::ok : result.error().code;
}
template <typename T>
std::string text_of(const Result<T>& result) {
  return result ? "ok" : result.error().to_string();
}

}  // namespace refit::test
