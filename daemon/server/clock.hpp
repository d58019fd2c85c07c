// The daemon's clock.
//
// A name of its own, so that the simulation can build the same code over a clock that it moves
// itself (tests/sim/twin/server/clock.hpp).
#pragma once

#include <chrono>

namespace refit::daemon {

using Clock = std::chrono::steady_clock;

}  // namespace refit::daemon
