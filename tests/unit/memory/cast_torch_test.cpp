// Every cast beside libtorch's copy_: the same bits for every input that is no NaN, NaN for every
// other and for no more.
//
// Which NaN is not asked: libtorch 1.13 gives 0xffff or 0x7fc0 by the path that it takes. By
// default every 257th float32; with REFIT_WHOLE_SCAN in the environment all of them, which takes
// minutes.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <vector>

#include "memory/cast_kernels.hpp"
#include "memory/copy_kernels.hpp"

namespace {

using refit::Cast;

constexpr std::int64_t kBlockElements = std::int64_t{1} << 20;

at::ScalarType scalar_type(refit::DType dtype) {
  switch (dtype) {
    case refit::DType::bfloat16:
      return at::kBFloat16;
    case refit::DType::float16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

template <typename Bits>
bool is_nan(Bits bits, Bits infinity) {
  return (bits & (static_cast<Bits>(~Bits{0}) >> 1)) > infinity;
}

template <typename Bits>
void expect_same(const std::byte* ours, const void* theirs, std::int64_t count, Bits infinity,
                 std::uint64_t first, std::uint64_t step) {
  const auto* b = static_cast<const Bits*>(theirs);
  for (std::int64_t i = 0; i < count; ++i) {
    Bits a = 0;
    std::memcpy(&a, ours + static_cast<std::size_t>(i) * sizeof a, sizeof a);
    const bool same = is_nan(a, infinity) ? is_nan(b[i], infinity) : a == b[i];
    ASSERT_TRUE(same) << std::hex << "input 0x" << first + static_cast<std::uint64_t>(i) * step
                      << ": 0x" << a << ", libtorch has 0x" << b[i];
  }
}

/// All inputs first, first + step, ... below `end`.
template <typename In>
void scan(refit::DType from, refit::DType to, std::uint64_t end, std::uint64_t step) {
  const Cast cast = *refit::cast_between(from, to);
  const at::Tensor source = at::empty({kBlockElements}, scalar_type(from));
  const at::Tensor target = at::empty({kBlockElements}, scalar_type(to));
  auto* const in = static_cast<In*>(source.data_ptr());
  std::vector<std::byte> ours(static_cast<std::size_t>(kBlockElements) *
                              refit::target_unit_bytes(cast));
  for (std::uint64_t first = 0; first < end && !::testing::Test::HasFatalFailure();
       first += step * kBlockElements) {
    std::int64_t count = 0;
    for (std::uint64_t bits = first; count < kBlockElements && bits < end; bits += step)
      in[count++] = static_cast<In>(bits);
    target.copy_(source);
    refit::cast_elements(cast, ours.data(), static_cast<const std::byte*>(source.data_ptr()),
                         static_cast<std::size_t>(count));
    refit::copy_fence();
    switch (to) {
      case refit::DType::float32:
        expect_same<std::uint32_t>(ours.data(), target.data_ptr(), count, 0x7f800000U, first, step);
        break;
      case refit::DType::bfloat16:
        expect_same<std::uint16_t>(ours.data(), target.data_ptr(), count, 0x7f80U, first, step);
        break;
      default:
        expect_same<std::uint16_t>(ours.data(), target.data_ptr(), count, 0x7c00U, first, step);
    }
  }
}

std::uint64_t float32_step() { return std::getenv("REFIT_WHOLE_SCAN") == nullptr ? 257 : 1; }

TEST(CastTorch, Float32ToBothShortOnes) {
  constexpr std::uint64_t kEnd = std::uint64_t{1} << 32;
  scan<std::uint32_t>(refit::DType::float32, refit::DType::bfloat16, kEnd, float32_step());
  scan<std::uint32_t>(refit::DType::float32, refit::DType::float16, kEnd, float32_step());
}

TEST(CastTorch, EveryShortOne) {
  constexpr std::uint64_t kEnd = std::uint64_t{1} << 16;
  scan<std::uint16_t>(refit::DType::bfloat16, refit::DType::float32, kEnd, 1);
  scan<std::uint16_t>(refit::DType::float16, refit::DType::float32, kEnd, 1);
  scan<std::uint16_t>(refit::DType::bfloat16, refit::DType::float16, kEnd, 1);
  scan<std::uint16_t>(refit::DType::float16, refit::DType::bfloat16, kEnd, 1);
}

}  // namespace
