// The simulation's clock: moves only when the kernel moves it.
//
// Found before daemon/server/clock.hpp by the simulation's build alone.
#pragma once

#include <chrono>

#include "kernel.hpp"

namespace refit::daemon {

struct Clock : std::chrono::steady_clock {
  static time_point now() noexcept { return sim::now(); }
};

}  // namespace refit::daemon
