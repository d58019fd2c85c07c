// How long a side reads a shared word before it blocks.
//
// No spin time wins everywhere: a spinner on a host with few cores holds the one that its peer
// needs. `adaptive` therefore spends a few microseconds, gives the core away while it does, and is
// used only where the awaited work is known to be that short; waits that span a copy or a check
// block at once.
#pragma once

#include <sched.h>

#include <chrono>
#include <cstdint>

#include "refit/types.hpp"

namespace refit {

inline constexpr std::chrono::microseconds kAdaptiveSpin{20};

inline void cpu_relax() noexcept {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// Reads `ready` until it is true or the adaptive budget is spent; returns what it last said.
/// Yields the core every few reads, so that a peer which was just woken on it can run.
template <typename Ready>
bool spin_briefly(Ready&& ready) {
  constexpr int kReadsPerYield = 32;
  const auto end = std::chrono::steady_clock::now() + kAdaptiveSpin;
  do {
    for (int i = 0; i < kReadsPerYield; ++i) {
      if (ready()) return true;
      cpu_relax();
    }
    ::sched_yield();
  } while (std::chrono::steady_clock::now() < end);
  return ready();
}

}  // namespace refit
