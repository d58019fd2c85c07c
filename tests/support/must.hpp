// must: the value of a Result that a test cannot go on without.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <utility>

#include "refit/result.hpp"

namespace refit::test {

/// Ends the test process with the error's text; a fixture that is not there makes every assertion
/// after it meaningless.
template <typename T>
T must(Result<T> result) {
  if (!result) {
    std::fprintf(stderr, "fixture failed: %s\n", result.error().to_string().c_str());
    std::abort();
  }
  if constexpr (!std::is_void_v<T>) return std::move(*result);
}

}  // namespace refit::test
