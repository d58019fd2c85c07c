// LayerReading: the device place of one layer buffer, read while its engine may move it.
//
// One thread. What the engine says is checked (plan/residency.hpp). A place that was left meanwhile
// is found: its word's generation grows with every change, and the engine stores the word before it
// touches the bytes of a place that it gives up.
#pragma once

#include <cstdint>

#include "plan/residency.hpp"
#include "server/session.hpp"

namespace refit::daemon {

class LayerReading {
 public:
  /// Both outlive the reading.
  LayerReading(const Registration& registration, const RequestRegion& engine, std::uint32_t buffer)
      : manifest_(*registration.manifest),
        word_(engine.residency[registration.residency_base + buffer]),
        buffer_(buffer) {}

  /// Where to read now. Absent also if the engine never said, and after kAttemptsMax places that it
  /// left. Errors: as read_place.
  [[nodiscard]] Result<LayerPlace> look();
  /// What was read since look() was the layer's. If not, look again.
  [[nodiscard]] bool held_still() const noexcept;

  static constexpr int kAttemptsMax = 8;

 private:
  const Manifest& manifest_;
  const SharedWord<std::uint64_t>& word_;
  std::uint32_t buffer_;
  std::uint64_t seen_ = 0;
  int attempts_ = 0;
};

}  // namespace refit::daemon
