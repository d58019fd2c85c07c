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

/// How long `adaptive` reads where nothing better is known.
inline constexpr std::chrono::microseconds kAdaptiveSpin{20};

/// The longest that it reads for work whose last turn is known to have been shorter: a peer that
/// must be woken from an idle core takes some 25 us of that by itself (measured), and a reader that
/// gives up just before pays twice.
inline constexpr std::chrono::microseconds kAdaptiveSpinMax{80};

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
bool spin_briefly(Ready&& ready, std::chrono::microseconds budget = kAdaptiveSpin) {
  constexpr int kReadsPerYield = 32;
  const auto end = std::chrono::steady_clock::now() + budget;
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
