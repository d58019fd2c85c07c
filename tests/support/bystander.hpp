// Bystander: an honest trainer and engine beside an attack, and the proof that they go on.
//
// goes_on() refits new bytes through sessions that were open before the attack, compares them,
// reads them back through the checker, and asks the daemon for its pid. One thread of its own
// answers the engine's gate. They do not reconnect: a session that an attack ended must show.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "refit/engine.hpp"
#include "refit/observer.hpp"
#include "refit/trainer.hpp"
#include "support/daemon_process.hpp"
#include "support/model.hpp"
#include "support/waiting_engine.hpp"

namespace refit::test {

class Bystander {
 public:
  Bystander(const std::string& socket, pid_t daemon, const std::string& name = "bystander")
      : daemon_(daemon),
        name_(name),
        trainer_(
            must(Trainer::connect(name, {socket, Waiting::adaptive, /*reconnect=*/false}, soon()))),
        engine_(
            must(Engine::connect(name, {socket, Waiting::adaptive, /*reconnect=*/false}, soon()))),
        observer_(must(
            Observer::connect(name, {socket, Waiting::adaptive, /*reconnect=*/false}, soon()))) {
    must(trainer_.register_module(source_.spec(), soon()));
    must(engine_.register_module(target_.spec(), soon()));
  }

  /// Fails the calling test if the daemon or these sessions suffered.
  void goes_on() {
    source_.fill(++seed_);
    {
      const WaitingEngine waiting(engine_);
      const auto report = trainer_.refit({name_, "bystander"}, soon());
      ASSERT_TRUE(report) << report.error().to_string();
    }
    EXPECT_TRUE(target_.equals(source_));
    EXPECT_EQ(engine_.version("bystander"), ++version_);
    const auto digests = observer_.digest({name_, "bystander"}, soon());
    ASSERT_TRUE(digests) << digests.error().to_string();
    EXPECT_EQ(digests->tensors.size(), target_.names().size());
    const auto status = observer_.status(soon());
    ASSERT_TRUE(status) << status.error().to_string();
    EXPECT_EQ(status->pid, static_cast<std::uint32_t>(daemon_)) << "another daemon answers";
  }

  Observer& observer() { return observer_; }
  Trainer& trainer() { return trainer_; }
  [[nodiscard]] const std::string& name() const { return name_; }

 private:
  static Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }

  pid_t daemon_;
  std::string name_;
  Model source_{"bystander", small_tensors()};
  Model target_{"bystander", small_tensors()};
  Trainer trainer_;
  Engine engine_;
  Observer observer_;
  std::uint64_t seed_ = 0;
  std::uint64_t version_ = 0;
};

}  // namespace refit::test
