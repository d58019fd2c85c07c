// The residency word of one layer buffer: where its device place is now, if it has one.
//
// The engine writes it (request region), whenever a layer comes or goes; the daemon reads it once
// in a gate, where it holds still, and before and after it hashes a device place outside of one:
// the generation tells it that the layer did not move meanwhile. Nothing in it is trusted:
// plan/residency checks it. Pure.
#pragma once

#include <cstdint>

namespace refit {

enum class ResidencyState : std::uint8_t {
  unsaid = 0,  ///< never written: not the same as absent, which only the engine can know
  absent = 1,
  resident = 2,
};

/// {state:2, region:6, generation:16, offset:40}. `region` is a pool among the module's regions.
struct ResidencyWord {
  static constexpr std::uint64_t kOffsetMax = (std::uint64_t{1} << 40) - 1;
  static constexpr std::uint32_t kRegionMax = 63;
  /// What every resident buffer's address is a multiple of.
  static constexpr std::uint64_t kAlignBytes = 32;

  ResidencyState state = ResidencyState::unsaid;
  std::uint8_t region = 0;
  std::uint16_t generation = 0;  ///< grows with every change
  std::uint64_t offset = 0;      ///< bytes from the pool's start

  [[nodiscard]] std::uint64_t pack() const noexcept {
    return static_cast<std::uint64_t>(state) << 62 | std::uint64_t{region} << 56 |
           std::uint64_t{generation} << 40 | offset;
  }
  static ResidencyWord unpack(std::uint64_t word) noexcept {
    return {static_cast<ResidencyState>(word >> 62), static_cast<std::uint8_t>(word >> 56 & 0x3f),
            static_cast<std::uint16_t>(word >> 40), word & kOffsetMax};
  }
};

}  // namespace refit
