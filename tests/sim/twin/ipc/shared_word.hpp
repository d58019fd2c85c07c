// The simulation's words: every access is a place where another actor may get the turn, and what a
// dead process still stores is seen by nobody.
//
// Found before core/ipc/shared_word.hpp by the simulation's build alone.
#pragma once

#include "kernel.hpp"

namespace refit {

template <typename T>
class SharedWord {
 public:
  [[nodiscard]] T load() const noexcept {
    sim::turn();
    return value_;
  }
  void store(T value) noexcept {
    sim::turn();
    if (!sim::dying()) value_ = value;
  }
  /// For the model, which looks without taking part.
  [[nodiscard]] T peek() const noexcept { return value_; }

 private:
  T value_;
};

}  // namespace refit
