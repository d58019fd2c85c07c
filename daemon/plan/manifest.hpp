// A client's list of tensors after every check that needs no second manifest.
//
// Pure: no syscall, no clock, no thread of its own. Built once per registration, immutable
// afterwards and shared by plans and running refits. Knows nothing of sessions, sockets or mapped
// memory. Every number and name in it was written by a peer: nothing may overflow, and no step may
// cost more than n log n.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ipc/shared_layout.hpp"
#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit::daemon {

/// What the pure part needs to know of a region. Two regions with one identity are the same memory.
struct RegionInfo {
  std::uint64_t bytes = 0;
  std::uint64_t device = 0;  ///< st_dev
  std::uint64_t inode = 0;   ///< st_ino
  bool pool = false;         ///< device places of layer buffers lie here, and no tensor
};

struct ManifestLimits {
  std::size_t tensors_max = 65'536;
  std::size_t name_bytes_max = 512;
  std::size_t dims_max = 8;
  std::size_t regions_max = 4'096;
  std::size_t name_rules_max = 256;
  std::size_t pattern_bytes_max = 1'024;
  std::size_t layer_buffers_max = kLayerBuffersMax;
};

class Manifest {
 public:
  /// No tensor has more dimensions, whatever the limits say: a copy has that many loops.
  static constexpr std::size_t kDimsMax = 8;

  /// Checks a whole manifest and lists everything wrong with it at once (Errc::bad_manifest; one
  /// detail per problem, sorted, each naming the tensor): duplicate or illegal names, bad dtype,
  /// too many dims, shape or byte arithmetic that overflows, strides, offsets and lengths that
  /// leave the region, boxes that leave their global shape, regions that do not exist, name rules
  /// that do not compile or rewrite a name to an illegal one, limits. For an engine also
  /// overlapping tensors (by the regions' identity) and strides that make one tensor overlap
  /// itself; strided tensors that interleave are taken where they are apart modulo a common stride
  /// (the columns of one matrix) and refused otherwise. Of many tensors that overlap each other not
  /// every pair is listed. A manifest with too many tensors, regions or rules is refused before any
  /// of them is read.
  ///
  /// An engine's layer buffers are given by their bytes. Their tensors lie apart in them as all do
  /// in regions; no tensor lies in a pool, which is no other region's memory.
  ///
  /// An empty tensor (one extent is zero) has no bytes; its offset may be the region's end.
  /// Allocates; may take as long as the name map's bounded work, so not on a thread that serves
  /// others.
  ///
  /// @param label  who registers, for messages: "engine/module" or "trainer/module".
  static Result<std::shared_ptr<const Manifest>> validate(
      const std::string& label, Role role, std::vector<TensorSpec> tensors,
      std::vector<RegionInfo> regions, std::vector<NameRule> name_map,
      const ManifestLimits& limits = {}, std::vector<std::uint64_t> layer_buffers = {});

  Manifest(const Manifest&) = delete;
  Manifest& operator=(const Manifest&) = delete;

  [[nodiscard]] const std::string& label() const noexcept { return label_; }
  /// With strides, global_shape and box_offset filled in.
  [[nodiscard]] const std::vector<TensorSpec>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::vector<RegionInfo>& regions() const noexcept { return regions_; }
  [[nodiscard]] const std::vector<NameRule>& name_map() const noexcept { return name_map_; }
  /// The bytes of each layer buffer.
  [[nodiscard]] const std::vector<std::uint64_t>& layer_buffers() const noexcept {
    return layer_buffers_;
  }
  /// Bytes of all tensors (elements, not spans).
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// The tensor of that name, or nullptr.
  [[nodiscard]] const TensorSpec* find(std::string_view name) const noexcept;

  /// One line for each pair of tensors that share memory across the two manifests, and for each
  /// pool that both have, sorted. Of many that overlap each other not every pair is listed.
  [[nodiscard]] std::vector<std::string> shared_with(const Manifest& other) const;

  /// Which target a tensor becomes, by the name map; its own name as a whole where no rule matches.
  struct Destination {
    std::string_view name;  ///< lives as long as the manifest
    std::uint32_t part = 0;
    std::uint32_t parts = 1;
  };
  [[nodiscard]] Destination destination(std::size_t tensor) const noexcept;

 private:
  Manifest() = default;
  std::string label_;
  std::vector<TensorSpec> tensors_;
  std::vector<RegionInfo> regions_;
  std::vector<NameRule> name_map_;
  std::vector<std::uint64_t> layer_buffers_;
  std::uint64_t bytes_ = 0;
  /// Indices sorted by name. Not a hash table: a peer could choose names that collide.
  std::vector<std::uint32_t> by_name_;
  std::vector<Destination> destinations_;  ///< empty without a name map
  std::deque<std::string> rewritten_;      ///< what destinations_ points to; never moves
};

}  // namespace refit::daemon
