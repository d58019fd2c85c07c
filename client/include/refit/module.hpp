// What a client registers: a named list of tensors in memory that the daemon can reach.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "refit/api.hpp"
#include "refit/device_memory.hpp"
#include "refit/memory.hpp"
#include "refit/residency.hpp"
#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit {

/// A module's manifest under construction. Holds its memory, so that what is registered stays
/// mapped.
class REFIT_API ModuleSpec {
 public:
  explicit ModuleSpec(std::string name) : name_(std::move(name)) {}

  /// Adds a tensor whose bytes lie in `memory` at `data`. Strides in elements; empty means
  /// row-major contiguous. Errors: Errc::bad_region if `data` is not inside `memory`.
  Result<void> add(std::string tensor, DType dtype, Dims shape,
                   const std::shared_ptr<Memory>& memory, const void* data, Dims strides = {});
  /// Adds a spec as it is; `spec.region` indexes the memories added so far. For callers that build
  /// boxes themselves.
  void add(TensorSpec spec) { tensors_.push_back(std::move(spec)); }
  /// Says that [data, data + bytes) holds all tensors of one offloaded layer and dtype: while the
  /// layer is resident, all of it has a second place in a pool, laid out alike. Tensors that are
  /// added later and begin inside of it are a part of it. Returns its number for Residency. Errors:
  /// Errc::bad_region if it is not inside `memory`.
  Result<std::uint32_t> add_layer_buffer(const std::shared_ptr<Memory>& memory, const void* data,
                                         std::uint64_t bytes);
  /// Memory in which layer buffers have their second places, and no tensor its first.
  std::uint32_t add_pool(const std::shared_ptr<Memory>& memory);
  /// Where the layers are, to be kept up to date by whoever moves them; null without layer buffers.
  /// Copies of a spec share it.
  [[nodiscard]] const std::shared_ptr<Residency>& residency() const noexcept { return residency_; }

  /// Index of `memory` among the module's regions; adds it if it is new.
  std::uint32_t add_region(const std::shared_ptr<Memory>& memory);
  /// Rewrite rules from this (source) module's names to a target's.
  void set_name_map(std::vector<NameRule> rules) { name_map_ = std::move(rules); }

  /// Where this process's own work on the tensors ends: a trainer's that writes them, an engine's
  /// that reads them. Marked before every refit, and waited for by it. Null: the caller has waited
  /// itself.
  void set_fence(std::shared_ptr<DeviceFence> fence) { fence_ = std::move(fence); }
  [[nodiscard]] const std::shared_ptr<DeviceFence>& fence() const noexcept { return fence_; }

  [[nodiscard]] const std::string& name() const noexcept { return name_; }
  [[nodiscard]] const std::vector<TensorSpec>& tensors() const noexcept { return tensors_; }
  [[nodiscard]] const std::vector<std::shared_ptr<Memory>>& regions() const noexcept {
    return regions_;
  }
  [[nodiscard]] bool is_pool(std::uint32_t region) const noexcept;
  /// The bytes of each layer buffer.
  [[nodiscard]] const std::vector<std::uint64_t>& layer_buffers() const noexcept {
    return layer_bytes_;
  }
  [[nodiscard]] const std::vector<NameRule>& name_map() const noexcept { return name_map_; }

 private:
  std::string name_;
  std::vector<TensorSpec> tensors_;
  std::vector<std::shared_ptr<Memory>> regions_;
  std::vector<NameRule> name_map_;
  std::vector<const std::byte*> layer_begins_;
  std::vector<std::uint64_t> layer_bytes_;
  std::vector<std::uint32_t> pools_;  ///< indices of regions
  std::shared_ptr<Residency> residency_;
  std::shared_ptr<DeviceFence> fence_;
};

/// Row-major layout of many tensors in one SharedMemory: each start aligned to `align_bytes`.
struct REFIT_API ArenaLayout {
  std::vector<std::uint64_t> offsets;  ///< per tensor, in the order given
  std::uint64_t bytes = 0;
  static ArenaLayout pack(const std::vector<std::uint64_t>& tensor_bytes,
                          std::uint64_t align_bytes = 64);
};

}  // namespace refit
