// What each cast does to one element. One source for the host's loops and for the kernels that nvcc
// compiles.
//
// Integers only: the result depends on no rounding mode, no flushing of subnormals and no library.
// Rounds to nearest, ties to even; what is too large becomes infinite. NaN stays NaN, becomes
// quiet, and keeps its sign and as many of the top bits of its payload as fit. No branches, so that
// compilers make wide registers of the loops around them.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define REFIT_HOST_DEVICE __host__ __device__
#else
#define REFIT_HOST_DEVICE
#endif

namespace refit::cast {

/// `a` where the condition holds, else `b`; written so that no compiler makes a jump of it.
REFIT_HOST_DEVICE constexpr std::uint32_t select(bool condition, std::uint32_t a,
                                                 std::uint32_t b) noexcept {
  return b ^ ((a ^ b) & (0U - static_cast<std::uint32_t>(condition)));
}

REFIT_HOST_DEVICE constexpr std::uint16_t float32_to_bfloat16(std::uint32_t bits) noexcept {
  const bool nan = (bits & 0x7fffffffU) > 0x7f800000U;
  const std::uint32_t quiet = bits >> 16 | 0x0040U;
  const std::uint32_t rounded = (bits + 0x7fffU + (bits >> 16 & 1U)) >> 16;
  return static_cast<std::uint16_t>(select(nan, quiet, rounded));
}

REFIT_HOST_DEVICE constexpr std::uint16_t float32_to_float16(std::uint32_t bits) noexcept {
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  const bool nan = magnitude > 0x7f800000U;
  const bool subnormal = magnitude < 0x38800000U;  // In float16: below 2^-14.
  const std::uint32_t quiet = 0x7e00U | (magnitude >> 13 & 0x03ffU);
  // Exponents count from 127 there and from 15 here.
  const std::uint32_t rebased = magnitude - 0x38000000U;
  const std::uint32_t rounded = (rebased + 0x0fffU + (rebased >> 13 & 1U)) >> 13;
  const std::uint32_t normal = select(rounded < 0x7c00U, rounded, 0x7c00U);
  // In units of 2^-24. A shift of 25 leaves nothing, whatever the exponent below.
  const std::uint32_t exponent = magnitude >> 23;
  const std::uint32_t shift =
      select(exponent < 101U, 25U, select(exponent > 112U, 14U, 126U - exponent));
  const std::uint32_t mantissa = (magnitude & 0x007fffffU) | 0x00800000U;
  const std::uint32_t small =
      (mantissa + (1U << (shift - 1U)) - 1U + (mantissa >> shift & 1U)) >> shift;
  const std::uint32_t number = select(subnormal, small, normal);
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000U) | select(nan, quiet, number));
}

REFIT_HOST_DEVICE constexpr std::uint32_t bfloat16_to_float32(std::uint16_t bits) noexcept {
  const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
  return wide | select((wide & 0x7fffffffU) > 0x7f800000U, 0x00400000U, 0U);
}

REFIT_HOST_DEVICE constexpr std::uint32_t float16_to_float32(std::uint16_t bits) noexcept {
  const std::uint32_t magnitude = bits & 0x7fffU;
  const std::uint32_t sign = (static_cast<std::uint32_t>(bits) & 0x8000U) << 16;
  const std::uint32_t normal = (magnitude << 13) + 0x38000000U;
  const std::uint32_t special =
      (magnitude << 13) | 0x7f800000U | select(magnitude > 0x7c00U, 0x00400000U, 0U);
  // A subnormal's leading bit is moved to bit 10, in steps, and its exponent falls by as much.
  const std::uint32_t by8 = select(magnitude < 1U << 3, 8U, 0U);
  const std::uint32_t by4 = select(magnitude << by8 < 1U << 7, 4U, 0U);
  const std::uint32_t by2 = select(magnitude << (by8 + by4) < 1U << 9, 2U, 0U);
  const std::uint32_t by1 = select(magnitude << (by8 + by4 + by2) < 1U << 10, 1U, 0U);
  const std::uint32_t shift = by8 + by4 + by2 + by1;
  const std::uint32_t leading = (magnitude << shift & 0x03ffU) << 13 | (113U - shift) << 23;
  const std::uint32_t small = select(magnitude == 0U, 0U, leading);
  const std::uint32_t number = select(magnitude < 0x0400U, small, normal);
  return sign | select(magnitude >= 0x7c00U, special, number);
}

// float32 holds every value of both, so that these two round once.
REFIT_HOST_DEVICE constexpr std::uint16_t bfloat16_to_float16(std::uint16_t bits) noexcept {
  return float32_to_float16(bfloat16_to_float32(bits));
}

REFIT_HOST_DEVICE constexpr std::uint16_t float16_to_bfloat16(std::uint16_t bits) noexcept {
  return float32_to_bfloat16(float16_to_float32(bits));
}

static_assert(float32_to_bfloat16(0x3f808000U) == 0x3f80U, "a tie goes to even: down");
static_assert(float32_to_bfloat16(0x3f818000U) == 0x3f82U, "a tie goes to even: up");
static_assert(float32_to_bfloat16(0x7f7fffffU) == 0x7f80U, "too large is infinite");
static_assert(float32_to_bfloat16(0xff800001U) == 0xffc0U, "a signalling NaN becomes a quiet one");
static_assert(float32_to_float16(0x477fefffU) == 0x7bffU, "the last that is not infinite");
static_assert(float32_to_float16(0x477ff000U) == 0x7c00U, "the first that is");
static_assert(float32_to_float16(0x33000000U) == 0x0000U, "half of the least: a tie");
static_assert(float32_to_float16(0x33000001U) == 0x0001U, "more than that");
static_assert(float32_to_float16(0xb87fffffU) == 0x8400U, "a subnormal that rounds to a normal");
static_assert(float32_to_float16(0x7f802000U) == 0x7e01U, "the payload's top bits stay");
static_assert(bfloat16_to_float32(0xff81U) == 0xffc10000U);
static_assert(float16_to_float32(0x0001U) == 0x33800000U);
static_assert(float16_to_float32(0x83ffU) == 0xb87fc000U);
static_assert(float16_to_float32(0x7c01U) == 0x7fc02000U);
static_assert(bfloat16_to_float16(0x4780U) == 0x7c00U && float16_to_bfloat16(0x3c04U) == 0x3f80U);

}  // namespace refit::cast
