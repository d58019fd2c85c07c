// The simulation's named points: true where the bug of that name is planted.
//
// Found before core/test_point.hpp by the simulation's build alone.
#pragma once

#include "kernel.hpp"

namespace refit {

inline bool test_point(const char* name) noexcept { return sim::planted(name); }

}  // namespace refit
