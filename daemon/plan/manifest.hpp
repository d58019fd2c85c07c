// A client's list of tensors after every check that needs no second manifest.
//
// Pure: no syscall, no clock, no thread of its own. Built once per registration, immutable afterwards and shared by
// plans and running refits. Knows nothing of sessions, sockets or mapped memory.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit::daemon {

/// What the pure part needs to know of a region. Two regions with one identity are the same memory.
struct RegionInfo {
  std::uint64_t bytes = 0;
  std::uint64_t device = 0;  ///< st_dev
  std::uint64_t inode = 0;   ///< st_ino
};

struct ManifestLimits {
  std::size_t tensors_max = 65'536;
  std::size_t name_bytes_max = 512;
  std::size_t dims_max = 8;
  std::size_t regions_max = 256;
  std::size_t name_rules_max = 256;
  std::size_t pattern_bytes_max = 1'024;
};

class Manifest {
 public:
  /// Checks a whole manifest and lists everything wrong with it at once (Errc::bad_manifest; one detail per problem,
  /// each naming the tensor): duplicate or empty names, bad dtype, too many dims, shape or byte arithmetic that
  /// overflows, strides, offsets and lengths that leave the region, boxes that leave their global shape, regions that do
  /// not exist, name rules that do not compile, limits. For a target also overlapping tensors (by the regions'
  /// identity) and strides that make one tensor overlap itself.
  ///
  /// @param label  who registers, for messages: "engine/module" or "trainer/module".
  static Result<std::shared_ptr<const Manifest>> validate(std::string label, Role role,
                                                          std::vector<TensorSpec> tensors,
                                                          std::vector<RegionInfo> regions,
                                                          std::vector<NameRule> name_map,
                                                          const ManifestLimits& limits = {});

  [[nodiscard]] const std::string& label() const noexcept { return label_; }
  [[nodiscard]] const std::vector<TensorSpec>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::vector<RegionInfo>& regions() const noexcept { return regions_; }
  [[nodiscard]] const std::vector<NameRule>& name_map() const noexcept { return name_map_; }
  /// Bytes of all tensors (elements, not spans).
  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  /// Index into tensors(), or nullptr.
  [[nodiscard]] const TensorSpec* find(std::string_view name) const;

 private:
  Manifest() = default;
  std::string label_;
  std::vector<TensorSpec> tensors_;  ///< strides, global_shape and box_offset filled in
  std::vector<RegionInfo> regions_;
  std::vector<NameRule> name_map_;
  std::uint64_t bytes_ = 0;
  std::unordered_map<std::string_view, std::size_t> index_;  ///< views into tensors_, which never moves again
};

}  // namespace refit::daemon
