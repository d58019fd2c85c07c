// Percentiles of samples, nearest rank: what is printed was measured, never interpolated.
//
// Pure, any thread. Knows nothing of what the samples mean.
#pragma once

#include <chrono>
#include <cstddef>
#include <vector>

namespace refit::bench {

using Samples = std::vector<double>;

/// The `percent`-th percentile by nearest rank; 0 for no samples.
[[nodiscard]] double percentile(Samples samples, double percent);
[[nodiscard]] inline double median(Samples samples) { return percentile(std::move(samples), 50); }
[[nodiscard]] double smallest(const Samples& samples);
[[nodiscard]] double largest(const Samples& samples);
/// a[i] / b[i] for the pairs that both have.
[[nodiscard]] Samples ratios(const Samples& a, const Samples& b);

/// Seconds that `action` takes on the monotonic clock.
template <typename Action>
double seconds_of(Action&& action) {
  const auto begin = std::chrono::steady_clock::now();
  action();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace refit::bench
