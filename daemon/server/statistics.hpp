// Statistics: what the daemon has done in its life, as counters and fixed histograms.
//
// The loop thread alone. Counting allocates nothing and asks the system nothing: it happens in
// every refit. Knows nothing of messages; reports.cpp makes one of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "refit/errc.hpp"
#include "server/session.hpp"

namespace refit::daemon {

class Histogram {
 public:
  /// Upper bounds of the buckets in microseconds; what is above the last one has a bucket of its
  /// own. From a refit of a few tensors to one of a large model behind a long step.
  static constexpr std::array<float, 20> kBoundsUs{
      10,      25,        50,        100,           250,           500,           1'000,
      2'500,   5'000,     10'000,    25'000,        50'000,        100'000,       250'000,
      500'000, 1'000'000, 2'500'000, 10'000'000.0F, 30'000'000.0F, 120'000'000.0F};

  void add(float us) noexcept {
    std::size_t bucket = 0;
    while (bucket < kBoundsUs.size() && us > kBoundsUs[bucket]) ++bucket;
    ++counts_[bucket];
    sum_us_ += static_cast<double>(us);
  }
  [[nodiscard]] const auto& counts() const noexcept { return counts_; }
  [[nodiscard]] double sum_us() const noexcept { return sum_us_; }

 private:
  std::array<std::uint64_t, kBoundsUs.size() + 1> counts_{};
  double sum_us_ = 0;
};

/// What a proof in the background found.
enum class ProofResult : std::uint8_t {
  equal,
  different,   ///< from the source as it is now, which the trainer may have changed since
  overtaken,   ///< by the next refit, or the memory was given up
  unreadable,  ///< memory that faulted, or a device that did not answer
  refuted,     ///< from the digests that came with the refit
};
inline constexpr std::size_t kProofResults = 5;

class Statistics {
 public:
  /// Every refit that was begun is counted once: here, or as failed. One that is answered from the
  /// record of an earlier one is none.
  void committed(const PhaseTimes& times, std::uint64_t bytes) noexcept {
    ++committed_;
    moved_bytes_ += bytes;
    wait_.add(times.wait_us);
    gate_.add(times.gate_us);
    copy_.add(times.copy_us);
    total_.add(times.total_us);
  }
  void failed(Errc reason) noexcept {
    const auto code = static_cast<std::size_t>(reason);
    if (code < failures_.size()) ++failures_[code];
  }
  void checked(std::uint64_t verified, std::uint64_t mismatched, std::uint64_t missing) noexcept {
    ++checks_;
    tensors_verified_ += verified;
    tensors_mismatched_ += mismatched;
    tensors_missing_ += missing;
  }
  void proved(ProofResult result) noexcept { ++proofs_[static_cast<std::size_t>(result)]; }

  [[nodiscard]] std::uint64_t committed_count() const noexcept { return committed_; }
  [[nodiscard]] std::uint64_t moved_bytes() const noexcept { return moved_bytes_; }
  /// By the number of the code.
  [[nodiscard]] const auto& failures() const noexcept { return failures_; }
  [[nodiscard]] const Histogram& wait() const noexcept { return wait_; }
  [[nodiscard]] const Histogram& gate() const noexcept { return gate_; }
  [[nodiscard]] const Histogram& copy() const noexcept { return copy_; }
  [[nodiscard]] const Histogram& total() const noexcept { return total_; }
  [[nodiscard]] std::uint64_t checks() const noexcept { return checks_; }
  [[nodiscard]] std::uint64_t tensors_verified() const noexcept { return tensors_verified_; }
  [[nodiscard]] std::uint64_t tensors_mismatched() const noexcept { return tensors_mismatched_; }
  [[nodiscard]] std::uint64_t tensors_missing() const noexcept { return tensors_missing_; }
  [[nodiscard]] std::uint64_t proofs(ProofResult result) const noexcept {
    return proofs_[static_cast<std::size_t>(result)];
  }

 private:
  std::uint64_t committed_ = 0;
  std::uint64_t moved_bytes_ = 0;
  std::array<std::uint64_t, 64> failures_{};
  Histogram wait_, gate_, copy_, total_;
  std::uint64_t checks_ = 0;
  std::uint64_t tensors_verified_ = 0;
  std::uint64_t tensors_mismatched_ = 0;
  std::uint64_t tensors_missing_ = 0;
  std::array<std::uint64_t, kProofResults> proofs_{};
};

}  // namespace refit::daemon
