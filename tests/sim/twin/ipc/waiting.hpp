// The simulation's waiting: what is read for a few microseconds is read a few times.
//
// Found before core/ipc/waiting.hpp by the simulation's build alone.
#pragma once

#include <chrono>

#include "kernel.hpp"
#include "refit/types.hpp"

namespace refit {

inline constexpr std::chrono::microseconds kAdaptiveSpin{20};
inline constexpr std::chrono::microseconds kAdaptiveSpinMax{80};

inline void cpu_relax() noexcept {}

template <typename Ready>
bool spin_briefly(Ready&& ready, std::chrono::microseconds budget = kAdaptiveSpin) {
  const auto end = sim::now() + budget;
  while (sim::now() < end && !sim::dying()) {
    if (ready()) return true;
    sim::give_way();
  }
  return ready();
}

}  // namespace refit
