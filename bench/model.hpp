// The tensors of a real model, read from a manifest file, at full size, scaled down, or cut to 64
// bytes each.
//
// Pure but for reading the file; any thread. Both roles load the same file, so that nothing but a
// path travels between them. Knows nothing of memory or of the daemon.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit::bench {

struct ModelTensor {
  std::string name;
  Dims shape;
  std::uint64_t bytes = 0;
};

/// Where a source tensor lands: the target's index and the byte offset in it (fused targets have
/// several sources).
struct Placement {
  std::uint32_t target = 0;
  std::uint64_t offset_bytes = 0;
};

struct Model {
  std::string name;
  DType dtype = DType::bfloat16;
  std::vector<ModelTensor> source;
  std::vector<ModelTensor> target;
  std::vector<NameRule> rules;
  std::vector<Placement> placements;  ///< one per source tensor
  std::uint64_t bytes = 0;            ///< of all source tensors, which are those of all targets
  /// What an engine may offload layer by layer: "blocks" are the layers "blocks.0.", "blocks.1."
  /// ...
  std::vector<std::string> layer_lists;
};

/// Reads `path`, derives every target's shape from its sources by the name map and compares with
/// the file's own target list; then multiplies every source dimension by `scale` (at least 1
/// remains) and derives the targets again, so that fused targets stay the sum of their parts.
/// Errors: bad_argument naming the file and the tensor.
[[nodiscard]] Result<Model> load_model(const std::string& path, double scale);

/// The same tensors with 64 bytes of elements in each source; a target that is fused from n sources
/// has n x 64.
[[nodiscard]] Result<Model> cut_to_64_bytes(const Model& model);

/// Byte offsets of tensors in one arena.
struct Layout {
  std::vector<std::uint64_t> offsets;
  std::uint64_t bytes = 0;
};

/// How models lie in memory at full size: each tensor at the next 64-byte boundary.
inline constexpr std::uint64_t kPackedAlignBytes = 64;
/// How 64-byte tensors lie: with a gap after each, so that no two copies can be merged into one.
inline constexpr std::uint64_t kApartAlignBytes = 128;

[[nodiscard]] inline std::uint64_t rounded_to(std::uint64_t bytes, std::uint64_t align_bytes) {
  return (bytes + align_bytes - 1) / align_bytes * align_bytes;
}

[[nodiscard]] Layout lay_out(const std::vector<ModelTensor>& tensors, std::uint64_t align_bytes);

/// A run of bytes in an arena.
struct Extent {
  std::uint64_t offset = 0;
  std::uint64_t bytes = 0;
};

/// Where the layers of `model.layer_lists` lie: one extent for each run of neighbours in `tensors`
/// that belong to one layer.
[[nodiscard]] std::vector<Extent> layers_of(const Model& model,
                                            const std::vector<ModelTensor>& tensors,
                                            const Layout& layout);

}  // namespace refit::bench
