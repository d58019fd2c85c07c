// What a refit does, whatever memory the tensors are in. One suite, instantiated per memory kind: host now, the CUDA kinds
// join when they exist.
//
// Each test runs a real daemon; trainer and engine live in this process, the engine on a thread of its own unless the test
// is about sharing one.

#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "refit/engine.hpp"
#include "refit/observer.hpp"
#include "refit/trainer.hpp"
#include "support/daemon_process.hpp"
#include "support/model.hpp"

namespace refit::test {
namespace {

using namespace std::chrono_literals;

enum class MemoryKind { host };

class Refit : public ::testing::TestWithParam<MemoryKind> {
 protected:
  Refit() : daemon_(socket_) {}

  static Deadline soon() { return Deadline::in(20s); }
  [[nodiscard]] ConnectOptions options() const { return {socket_, Waiting::adaptive}; }

  Trainer make_trainer(Model& model) {
    Trainer trainer = must(Trainer::connect("trainer", options(), soon()));
    must(trainer.register_module(model.spec(), soon()));
    return trainer;
  }
  Engine make_engine(const std::string& name, Model& model) {
    Engine engine = must(Engine::connect(name, options(), soon()));
    must(engine.register_module(model.spec(), soon()));
    return engine;
  }

  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
  DaemonProcess daemon_;
};

/// Answers an engine's gate on a thread until destroyed.
class WaitingEngine {
 public:
  explicit WaitingEngine(Engine& engine) : thread_([this, &engine] {
    while (!stop_.load()) {
      auto event = engine.wait(Deadline::in(50ms));
      if (!event) return;
      if (*event) ++events_;
    }
  }) {}
  ~WaitingEngine() {
    stop_.store(true);
    thread_.join();
  }
  [[nodiscard]] int events() const { return events_.load(); }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> events_{0};
  std::thread thread_;
};

TEST_P(Refit, CopiesEveryTensorAndCountsVersions) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  const WaitingEngine waiting(engine);
  for (std::uint64_t step = 1; step <= 20; ++step) {
    source.fill(step);
    const auto report = trainer.refit({"flux", "transformer"}, soon());
    ASSERT_TRUE(report) << report.error().to_string();
    EXPECT_EQ(report->version, step);
    EXPECT_EQ(report->tensors, source.names().size());
    EXPECT_TRUE(target.equals(source));
  }
}

TEST_P(Refit, SharesOneThreadBetweenTrainerAndEngine) {
  Model source("transformer", small_tensors());
  Model target("transformer", small_tensors());
  Trainer trainer = make_trainer(source);
  Engine engine = make_engine("flux", target);
  engine.bind_to_this_thread();
  source.fill(1);
  const auto report = trainer.refit({"flux", "transformer"}, soon());
  ASSERT_TRUE(report) << report.error().to_string();
  EXPECT_TRUE(target.equals(source));
  const auto event = engine.poll(soon());
  ASSERT_TRUE(event);
  ASSERT_TRUE(*event);
  ASSERT_EQ((*event)->modules.size(), 1U);
  EXPECT_EQ((*event)->modules[0].version, 1U);
}

INSTANTIATE_TEST_SUITE_P(Memory, Refit, ::testing::Values(MemoryKind::host), [](const auto&) { return "Host"; });

}  // namespace
}  // namespace refit::test
