// Casts: what an element becomes, by the definition of rounding, and that every loop of this CPU
// gives the same.
//
// One thread. Whether libtorch agrees is asked where libtorch is: cast_torch_test.cpp.
#include "memory/cast_kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "memory/cast_elements.hpp"
#include "memory/copy_kernels.hpp"
#include "support/cast_by_definition.hpp"
#include "support/effort.hpp"

namespace refit {
namespace {

constexpr std::byte kUntouched{0xEE};

constexpr Cast kCasts[] = {
#define REFIT_X(from, to) Cast::from##_to_##to,
    REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
};

float as_float(std::uint32_t bits) {
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

std::uint32_t as_bits(float value) {
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// ---- elements

/// A 16-bit format: exponent and fraction bits, and its value by the formula.
struct Format {
  int fraction_bits;
  int bias;
  std::uint16_t infinity;

  [[nodiscard]] double value(std::uint16_t magnitude) const {
    const int exponent = magnitude >> fraction_bits;
    const int fraction = magnitude & ((1 << fraction_bits) - 1);
    const int unit = std::max(exponent, 1) - bias - fraction_bits;
    return std::ldexp(fraction + (exponent > 0 ? 1 << fraction_bits : 0), unit);
  }
};
constexpr Format kBfloat16{7, 127, 0x7f80};
constexpr Format kFloat16{10, 15, 0x7c00};

// Goal: every boundary between two neighbours lies where round to nearest even has it. Method: all
// finite values, the middle above each of them, and the two floats next to that middle; infinity
// counts as the value after the last.
template <typename Narrow, typename Widen>
void expect_rounds_to_nearest_even(const Format& format, Narrow&& narrow, Widen&& widen) {
  for (std::uint32_t i = 0; i < format.infinity; ++i) {
    const auto low = static_cast<std::uint16_t>(i);
    const double below = format.value(low);
    const double above = format.value(static_cast<std::uint16_t>(low + 1));
    const auto middle = static_cast<float>((below + above) / 2);
    ASSERT_EQ(middle, (below + above) / 2) << "a float holds it";
    const auto even = static_cast<std::uint16_t>(low + (low & 1U));
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const auto with = [&](std::uint32_t bits) { return static_cast<std::uint16_t>(bits | sign); };
      const std::uint32_t wide_sign = sign << 16;
      ASSERT_EQ(widen(with(low)), as_bits(static_cast<float>(below)) | wide_sign) << low;
      ASSERT_EQ(narrow(as_bits(static_cast<float>(below)) | wide_sign), with(low));
      ASSERT_EQ(narrow(as_bits(middle) | wide_sign), with(even)) << low;
      ASSERT_EQ(narrow((as_bits(middle) - 1) | wide_sign), with(low)) << low;
      ASSERT_EQ(narrow((as_bits(middle) + 1) | wide_sign), with(low + 1U)) << low;
    }
  }
  ASSERT_EQ(narrow(0x7f800000U), format.infinity);
  ASSERT_EQ(narrow(0x7f7fffffU), format.infinity);
  ASSERT_EQ(widen(format.infinity), 0x7f800000U);
}

TEST(CastElements, RoundToNearestEvenAtEveryBoundary) {
  expect_rounds_to_nearest_even(kBfloat16, cast::float32_to_bfloat16, cast::bfloat16_to_float32);
  expect_rounds_to_nearest_even(kFloat16, cast::float32_to_float16, cast::float16_to_float32);
}

TEST(CastElements, NanBecomesQuietAndKeepsItsSignAndTheTopOfItsPayload) {
  for (std::uint32_t payload = 1; payload < 0x00800000U;
       payload += payload < 0x4000U ? 1 : 0x1fffU) {
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const std::uint32_t nan = sign << 16 | 0x7f800000U | payload;
      ASSERT_EQ(cast::float32_to_bfloat16(nan), sign | 0x7fc0U | payload >> 16);
      ASSERT_EQ(cast::float32_to_float16(nan), sign | 0x7e00U | payload >> 13);
    }
  }
  for (std::uint32_t payload = 1; payload < 0x0400U; ++payload) {
    for (const std::uint32_t sign : {0U, 0x8000U}) {
      const auto nan = static_cast<std::uint16_t>(sign | 0x7c00U | payload);
      ASSERT_EQ(cast::float16_to_float32(nan), sign << 16 | 0x7fc00000U | payload << 13);
      ASSERT_EQ(cast::float16_to_bfloat16(nan), sign | 0x7fc0U | payload >> 3);
      if (payload >= 0x80U) continue;
      const auto short_nan = static_cast<std::uint16_t>(sign | 0x7f80U | payload);
      ASSERT_EQ(cast::bfloat16_to_float32(short_nan), sign << 16 | 0x7fc00000U | payload << 16);
      ASSERT_EQ(cast::bfloat16_to_float16(short_nan), sign | 0x7e00U | payload << 3);
    }
  }
}

// float32 holds every value of both, so that the way between them is the two ways through it.
TEST(CastElements, BetweenTheShortOnesItIsOneRounding) {
  for (std::uint32_t bits = 0; bits <= 0xffffU; ++bits) {
    const auto in = static_cast<std::uint16_t>(bits);
    const float from_bfloat16 = as_float(cast::bfloat16_to_float32(in));
    if (std::isnan(from_bfloat16)) continue;
    ASSERT_EQ(cast::bfloat16_to_float16(in), cast::float32_to_float16(as_bits(from_bfloat16)));
  }
}

// ---- loops

/// The inputs of a cast: all that 16 bits can be, and every kStep-th of what 32 can.
std::vector<std::byte> inputs(Cast cast) {
  std::vector<std::byte> bytes;
  if (source_unit_bytes(cast) == 2) {
    bytes.resize(std::size_t{2} << 16);
    for (std::uint32_t i = 0; i <= 0xffffU; ++i) {
      const auto value = static_cast<std::uint16_t>(i);
      std::memcpy(bytes.data() + std::size_t{2} * i, &value, sizeof value);
    }
    return bytes;
  }
  constexpr std::uint64_t kStep = test::kSanitized ? 8209 : 257;
  bytes.reserve(4 * ((std::uint64_t{1} << 32) / kStep + 1));
  for (std::uint64_t i = 0; i < std::uint64_t{1} << 32; i += kStep) {
    const auto value = static_cast<std::uint32_t>(i);
    const auto* const begin = reinterpret_cast<const std::byte*>(&value);
    bytes.insert(bytes.end(), begin, begin + sizeof value);
  }
  return bytes;
}

template <typename F>
void for_each_loop(F&& body) {
  std::size_t count = 0;
  const CastKernel* const kernels = cast_kernels(&count);
  ASSERT_TRUE(std::any_of(kernels, kernels + count, [](const auto& one) { return one.supported; }));
  for (std::size_t i = 0; i < count; ++i) {
    if (kernels[i].supported) body(kernels[i]);
  }
}

TEST(CastKernels, EveryLoopGivesWhatTheElementFunctionGives) {
  for (const Cast cast : kCasts) {
    const std::vector<std::byte> source = inputs(cast);
    const std::size_t count = source.size() / source_unit_bytes(cast);
    const std::size_t bytes = count * target_unit_bytes(cast);
    std::vector<std::byte> expected(bytes);
    test::cast_by_definition(cast, expected.data(), source.data(), bytes);
    const auto expect = [&](const std::vector<std::byte>& target, const char* name) {
      ASSERT_TRUE(target == expected) << name << ", cast " << static_cast<int>(cast);
    };
    for_each_loop([&](const CastKernel& sut) {
      std::vector<std::byte> target(bytes, kUntouched);
      sut.casts[static_cast<std::size_t>(cast)](target.data(), source.data(), count);
      expect(target, sut.name);
    });
    std::vector<std::byte> target(bytes, kUntouched);
    cast_elements(cast, target.data(), source.data(), count);
    copy_fence();
    expect(target, "cast_elements");
    std::fill(target.begin(), target.end(), kUntouched);
    cast_strided(cast, target.data(), source.data(), count, target_unit_bytes(cast),
                 source_unit_bytes(cast));
    expect(target, "cast_strided");
  }
}

// Goal: heads, tails and blocks write their own bytes and no others. Method: counts around every
// threshold, targets and sources at odd addresses too, guard bytes around the target.
TEST(CastKernels, SizesAndAlignmentsAroundEveryThreshold) {
  constexpr std::size_t kMargin = 128;
  std::vector<std::byte> source(4 * 10000 + kMargin);
  for (std::size_t i = 0; i < source.size(); ++i)
    source[i] = static_cast<std::byte>(i * 131 + i / 251);
  for (const Cast cast : kCasts) {
    const std::size_t unit = target_unit_bytes(cast);
    for (const std::size_t middle : {std::size_t{16}, kNonTemporalBytesMin / unit,
                                     2 * kNonTemporalBytesMin / unit, std::size_t{8192}}) {
      for (std::size_t count = middle - 2; count <= middle + 34;
           count += count < middle + 2 ? 1 : 16) {
        for (const std::size_t to : {0U, 1U, 2U, 33U, 62U}) {
          const std::size_t bytes = count * unit;
          std::vector<std::byte> expected(bytes + 2 * kMargin, kUntouched);
          std::vector<std::byte> target = expected;
          test::cast_by_definition(cast, expected.data() + kMargin + to, source.data() + to, bytes);
          cast_elements(cast, target.data() + kMargin + to, source.data() + to, count);
          copy_fence();
          ASSERT_TRUE(target == expected)
              << "cast " << static_cast<int>(cast) << ", " << count << " elements at +" << to;
        }
      }
    }
  }
}

}  // namespace
}  // namespace refit
