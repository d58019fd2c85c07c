#include "server/scheduler.hpp"

#include <algorithm>

namespace refit::daemon {

bool Scheduler::available(const Operation& operation) noexcept {
  return std::all_of(operation.engines.begin(), operation.engines.end(), [&](const auto& engine) {
    const EngineLock& lock = engine->lock;
    return !lock.blocked && !lock.exclusive && (!operation.exclusive() || lock.shared == 0);
  });
}

void Scheduler::enqueue(Operation& operation) {
  pending_.push_back(&operation);
  advance();
}

void Scheduler::leave(Operation& operation) {
  for (const auto& engine : operation.engines) {
    if (operation.exclusive()) {
      engine->lock.exclusive = false;
    } else {
      --engine->lock.shared;
    }
  }
  advance();
}

void Scheduler::withdraw(Operation& operation) {
  std::erase(pending_, &operation);
  advance();
}

void Scheduler::advance() {
  // start() may end an operation at once and come back here; the outer walk then goes round again.
  again_ = true;
  if (advancing_) return;
  advancing_ = true;
  while (again_) {
    again_ = false;
    Operation* startable = nullptr;
    for (Operation* operation : pending_) {
      if (startable == nullptr && available(*operation) && operation->runnable())
        startable = operation;
      for (const auto& engine : operation->engines) engine->lock.blocked = true;
    }
    for (Operation* operation : pending_) {
      for (const auto& engine : operation->engines) engine->lock.blocked = false;
    }
    if (startable == nullptr) continue;
    std::erase(pending_, startable);
    for (const auto& engine : startable->engines) {
      if (startable->exclusive()) {
        engine->lock.exclusive = true;
      } else {
        ++engine->lock.shared;
      }
    }
    again_ = true;
    startable->start();
  }
  advancing_ = false;
}

}  // namespace refit::daemon
