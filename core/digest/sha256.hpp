// SHA-256 by the CPU's own instructions (SHA-NI), for one stream or for two side by side.
//
// The one hash that is written here by hand. Each round of SHA-256 waits for the one before, so
// that one stream leaves half of such a CPU idle; the rounds of a second stream fit in between,
// which no call of OpenSSL's does. Any thread; an object belongs to one thread at a time. Knows
// bytes only.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace refit {

/// One hash in the making. Owns nothing: a fault that leaves a call by siglongjmp costs no more
/// than a reset(). Nothing but supported() may be called where that is false.
class Sha256 {
 public:
  using Value = std::array<std::uint8_t, 32>;

  /// Whether this CPU has the instructions.
  [[nodiscard]] static bool supported() noexcept;

  Sha256() noexcept { reset(); }
  void reset() noexcept;

  void update(std::span<const std::byte> bytes) noexcept;

  /// Feeds `a` from the front of `from_a` and `b` from that of `from_b`, both at once, and takes
  /// what was fed from the spans. Returns when one of the two is used up; one that is empty from
  /// the start lets the other be fed whole.
  static void update_two(Sha256& a, std::span<const std::byte>& from_a, Sha256& b,
                         std::span<const std::byte>& from_b) noexcept;

  /// The hash of what was fed since the last reset, and a reset.
  [[nodiscard]] Value finish() noexcept;

  static constexpr std::size_t kBlockBytes = 64;

  /// The eight words, in the order in which the instructions hold them.
  struct State {
    alignas(16) std::array<std::uint32_t, 4> feba;
    alignas(16) std::array<std::uint32_t, 4> hgdc;
  };

 private:
  void fill_block(std::span<const std::byte>& from) noexcept;
  void keep(std::span<const std::byte>& rest) noexcept;

  State state_;
  std::uint64_t bytes_ = 0;
  std::array<std::byte, kBlockBytes>
      block_;  ///< the first bytes_ % kBlockBytes of it wait for more
};

}  // namespace refit
