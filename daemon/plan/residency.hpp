// Where the layer buffers of an engine's module are now, out of words that the engine wrote.
//
// Pure: no syscall, no clock, no thread of its own. The words were read from shared memory once;
// this says whether they make sense. Knows no mapped memory.
#pragma once

#include <cstdint>
#include <vector>

#include "plan/manifest.hpp"
#include "refit/result.hpp"

namespace refit::daemon {

/// The device place of one layer buffer.
struct LayerPlace {
  bool resident = false;
  std::uint32_t region = 0;  ///< a pool of the module
  std::uint64_t offset = 0;
};

/// What one word says of layer buffer `buffer`: inside of a pool and aligned, or absent. Errors:
/// Errc::bad_region, naming module, buffer and its first tensor.
[[nodiscard]] Result<LayerPlace> read_place(const Manifest& manifest, std::uint32_t buffer,
                                            std::uint64_t word);

/// The places of all layer buffers of a module at one moment. Built once per plan; read() allocates
/// for an error only.
class LayerPlaces {
 public:
  explicit LayerPlaces(const Manifest& manifest);

  /// `words` has one word for each layer buffer. Errors as read_place, and for resident buffers
  /// that overlap. After an error the places mean nothing.
  [[nodiscard]] Result<void> read(const Manifest& manifest, const std::uint64_t* words);
  [[nodiscard]] const LayerPlace& operator[](std::size_t buffer) const noexcept {
    return places_[buffer];
  }

 private:
  std::vector<LayerPlace> places_;
  std::vector<std::uint32_t> resident_;  ///< in order of region and offset
};

}  // namespace refit::daemon
