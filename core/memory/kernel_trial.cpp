#include "memory/kernel_trial.hpp"

#include <algorithm>

namespace refit {

KernelTrial::KernelTrial(const CopyCandidates& candidates) noexcept
    : candidates_(candidates), chosen_(candidates.kernels.front()), over_(candidates.count < 2) {}

const CopyKernel& KernelTrial::next(std::uint64_t chunk_bytes, bool& timed) noexcept {
  timed = !over_.load() && chunk_bytes >= kChunkBytesMin;
  if (!timed) return chosen();
  // Mixed, so that no pattern in a model's tensors always meets the same candidate.
  const std::uint64_t turn = turn_.fetch_add(1) * 0x9E3779B97F4A7C15ULL;
  return *candidates_.kernels[(turn >> 32) % candidates_.count];
}

void KernelTrial::record(const CopyKernel& kernel, std::uint64_t bytes, std::uint64_t ns) noexcept {
  if (over_.load()) return;
  for (std::size_t i = 0; i < candidates_.count; ++i) {
    if (candidates_.kernels[i] != &kernel) continue;
    tallies_[i].ns.fetch_add(ns);
    tallies_[i].bytes.fetch_add(bytes);
  }
  const bool enough =
      std::all_of(tallies_.begin(), tallies_.begin() + candidates_.count,
                  [](const Tally& tally) { return tally.bytes.load() >= kTrialBytes; });
  if (enough) choose();
}

void KernelTrial::choose() noexcept {
  // Less than this is noise, and the first candidate the better guess.
  constexpr double kGainMin = 0.02;
  const auto ns_per_byte = [this](std::size_t i) {
    return static_cast<double>(tallies_[i].ns.load()) /
           static_cast<double>(tallies_[i].bytes.load());
  };
  std::size_t best = 0;
  for (std::size_t i = 1; i < candidates_.count; ++i) {
    const double bound = best == 0 ? ns_per_byte(0) * (1 - kGainMin) : ns_per_byte(best);
    if (ns_per_byte(i) < bound) best = i;
  }
  chosen_.store(candidates_.kernels[best]);
  over_.store(true);
}

}  // namespace refit
