// For what cannot fail in the simulation unless its own code is wrong.
#pragma once

#include <utility>

#include "refit/result.hpp"

namespace refit::sim {

template <typename T>
T must(Result<T> result) {
  REFIT_ASSERT(result.has_value());
  return std::move(*result);
}

}  // namespace refit::sim
