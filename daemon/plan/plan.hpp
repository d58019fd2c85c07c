// The plan: which bytes of a source manifest go where in a target manifest, or everything that is
// wrong.
//
// Pure: no syscall, no clock, no thread of its own. Compiled once per (source, target, selection)
// and cached by its owner; a steady refit only walks `copies`. Knows no sessions and no mapped
// memory.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "memory/cast.hpp"
#include "plan/manifest.hpp"
#include "refit/result.hpp"

namespace refit::daemon {

/// One strided copy: `run_bytes` contiguous bytes of the target, repeated over up to `kDimsMax`
/// loops (outermost first). A contiguous copy has no loops. The target never meets itself; the
/// source does where a stride of it is 0 (an expanded tensor). With a cast every run is whole
/// elements, and a run of the source has source_run_bytes().
struct Copy {
  static constexpr std::size_t kDimsMax = Manifest::kDimsMax;
  struct Loop {
    std::uint64_t count = 1;
    std::uint64_t source_stride_bytes = 0;
    std::uint64_t target_stride_bytes = 0;
  };
  std::uint32_t source_region = 0;
  std::uint32_t target_region = 0;
  std::uint64_t source_offset = 0;
  std::uint64_t target_offset = 0;
  std::uint64_t run_bytes = 0;
  std::uint32_t loop_count = 0;
  Cast cast = Cast::none;
  std::array<Loop, kDimsMax> loops{};

  [[nodiscard]] std::uint64_t source_run_bytes() const noexcept {
    return source_bytes_of(cast, run_bytes);
  }
  /// Bytes of the target that this copy writes.
  [[nodiscard]] std::uint64_t bytes() const noexcept {
    std::uint64_t total = run_bytes;
    for (std::uint32_t i = 0; i < loop_count; ++i) total *= loops[i].count;
    return total;
  }
};

struct PlanOptions {
  std::vector<std::string> selection;  ///< target names; empty means every target
  bool allow_unmatched = false;  ///< a source without a target is left alone instead of refused
};

struct Plan {
  /// In order of target region and offset; adjacent contiguous copies are merged.
  std::vector<Copy> copies;
  std::vector<std::uint32_t>
      targets;              ///< indices of the target tensors that are written, ascending
  std::uint64_t bytes = 0;  ///< of the target

  /// The same bytes for the device places: `target_region` is a layer buffer and `target_offset`
  /// from its start, wherever that is. In order of both, merged; only of targets that are part of
  /// one.
  std::vector<Copy> layer_copies;
  std::uint64_t layer_bytes = 0;

  /// Every pair of tensors with a cast between them, in the order of the targets.
  struct TensorCast {
    std::uint32_t source = 0;
    std::uint32_t target = 0;
  };
  std::vector<TensorCast> casts;

  /// True if every tensor of the target manifest is written.
  bool whole = false;

  /// Compiles a plan. Source names go through the source's name map; fused parts are placed along
  /// dimension 0 in part order, and may differ in extent there; boxes are intersected in the
  /// target's global shape, so sharded sources and targets are the same mechanism. A source of
  /// another dtype is cast, where memory/cast.hpp has a cast from its dtype to the target's.
  ///
  /// With a selection, sources of targets that are not selected are left alone, and so are sources
  /// that map to no target at all.
  ///
  /// Errors (Errc::manifest_mismatch, details complete and sorted, each naming the tensor and both
  /// sides): a source that maps to no target (unless allowed or outside the selection), a target
  /// that no source reaches, a selected name that the target lacks, several sources for the same
  /// bytes, fused targets with missing or inconsistent parts, dtypes without a cast between them,
  /// global shapes that differ, boxes that leave bytes of a target uncovered, source and target
  /// that are the same memory. Of many sources for the same bytes not every pair is listed. A
  /// target that is cut into boxes so oddly that proving them disjoint costs too much is refused
  /// too.
  static Result<Plan> compile(const Manifest& source, const Manifest& target,
                              const PlanOptions& options);
};

}  // namespace refit::daemon
