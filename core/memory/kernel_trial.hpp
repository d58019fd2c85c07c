// KernelTrial: which way of copying is the fastest on this machine, found by trying on real copies.
//
// Any thread. No CPU's name says which loop wins: a prefetch ahead gains 10 % on one AMD EPYC of
// family 25 and costs 8 % on another, four pages at once gain 43 % on an Intel Xeon of model 167
// (all measured), and rep movsb wins on some hosts. So the first
// large chunks are dealt to the candidates in turn and timed; memory that changes its speed
// meanwhile changes it for all of them. Knows nothing of jobs or threads.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "memory/copy_kernels.hpp"

namespace refit {

class KernelTrial {
 public:
  /// Chunks below this size say more about their start and end than about the loop.
  static constexpr std::uint64_t kChunkBytesMin = std::uint64_t{256} << 10;
  /// What each candidate copies before they are compared.
  static constexpr std::uint64_t kTrialBytes = std::uint64_t{256} << 20;

  explicit KernelTrial(const CopyCandidates& candidates = copy_candidates()) noexcept;

  /// The kernel for the next chunk: the one that was chosen, or while the trial runs and the chunk
  /// is long enough, the next candidate. `timed` tells whether record() wants to know how long it
  /// took.
  [[nodiscard]] const CopyKernel& next(std::uint64_t chunk_bytes, bool& timed) noexcept;

  /// `kernel`, as next() gave it, copied `bytes` in `ns`. The last one of the trial makes the
  /// choice.
  void record(const CopyKernel& kernel, std::uint64_t bytes, std::uint64_t ns) noexcept;

  /// The kernel of long runs; the first candidate until the trial is over.
  [[nodiscard]] const CopyKernel& chosen() const noexcept { return *chosen_.load(); }
  [[nodiscard]] bool over() const noexcept { return over_.load(); }

 private:
  void choose() noexcept;

  struct Tally {
    std::atomic<std::uint64_t> bytes{0};
    std::atomic<std::uint64_t> ns{0};
  };
  CopyCandidates candidates_;
  std::array<Tally, CopyCandidates::kCountMax> tallies_;
  std::atomic<std::uint64_t> turn_{0};
  std::atomic<const CopyKernel*> chosen_;
  std::atomic<bool> over_;
};

}  // namespace refit
