// WaitingEngine: answers an engine's gate on a thread of its own until destroyed.
//
// While it lives the engine belongs to that thread; only step_allowed(), state() and version() may
// be called by others.
#pragma once

#include <atomic>
#include <chrono>
#include <thread>

#include "refit/engine.hpp"

namespace refit::test {

class WaitingEngine {
 public:
  explicit WaitingEngine(Engine& engine) : thread_([this, &engine] {
    while (!stop_.load()) {
      auto event = engine.wait(Deadline::in(std::chrono::milliseconds(50)));
      if (!event) return;
      if (*event) ++events_;
    }
  }) {}
  ~WaitingEngine() {
    stop_.store(true);
    thread_.join();
  }
  WaitingEngine(const WaitingEngine&) = delete;
  WaitingEngine& operator=(const WaitingEngine&) = delete;
  [[nodiscard]] int events() const { return events_.load(); }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> events_{0};
  std::thread thread_;
};

}  // namespace refit::test
