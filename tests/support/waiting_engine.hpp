// WaitingEngine: lets an engine's gate through on the engine's own thread until destroyed.
//
// While it lives only step_allowed(), state() and version() of the engine may be called. It never
// steps back from a gate by itself, so a refit of it fails for no other reason than its own.
#pragma once

#include <atomic>

#include "refit/engine.hpp"
#include "support/must.hpp"

namespace refit::test {

class WaitingEngine {
 public:
  explicit WaitingEngine(Engine& engine) : engine_(engine) {
    must(engine_.serve({[](Deadline) { return true; },
                        [this](const GateEvent* event) { events_ += event != nullptr ? 1 : 0; }}));
  }
  ~WaitingEngine() { engine_.stop_serving(); }
  WaitingEngine(const WaitingEngine&) = delete;
  WaitingEngine& operator=(const WaitingEngine&) = delete;
  [[nodiscard]] int events() const { return events_.load(); }

 private:
  Engine& engine_;
  std::atomic<int> events_{0};
};

}  // namespace refit::test
