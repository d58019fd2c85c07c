// Every copy kernel that this CPU runs, against memcpy, byte by byte, with guard bytes around the
// target.
//
// One thread. Knows nothing of pools.
#include "memory/copy_kernels.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace refit {
namespace {

constexpr std::size_t kMarginBytes = 256;
constexpr unsigned char kUntouchedByte = 0xEE;

void expect_copies(const CopyKernel& sut, std::size_t bytes, std::size_t source_offset,
                   std::size_t target_offset) {
  std::vector<unsigned char> source(bytes + 2 * kMarginBytes);
  for (std::size_t i = 0; i < source.size(); ++i) {
    source[i] = static_cast<unsigned char>((i * 131 + i / 251) & 0x7F);
  }
  std::vector<unsigned char> target(bytes + 2 * kMarginBytes, kUntouchedByte);
  // Offsets from a line boundary, whatever the allocator gave.
  const auto aligned = [](std::vector<unsigned char>& memory, std::size_t offset) {
    const auto base = reinterpret_cast<std::uintptr_t>(memory.data());
    return (64 - base % 64) % 64 + offset;
  };
  const std::size_t from = aligned(source, source_offset);
  const std::size_t to = aligned(target, target_offset);
  ASSERT_LE(std::max(from, to) + bytes, source.size());
  sut.copy(target.data() + to, source.data() + from, bytes);
  copy_fence();
  const auto where = [&] {
    return std::string(sut.name) + ": " + std::to_string(bytes) + " bytes, source +" +
           std::to_string(source_offset) + ", target +" + std::to_string(target_offset);
  };
  ASSERT_TRUE(bytes == 0 || std::memcmp(target.data() + to, source.data() + from, bytes) == 0)
      << where();
  const auto untouched = [](unsigned char byte) { return byte == kUntouchedByte; };
  const auto begin = target.begin();
  ASSERT_TRUE(std::all_of(begin, begin + static_cast<std::ptrdiff_t>(to), untouched)) << where();
  ASSERT_TRUE(std::all_of(begin + static_cast<std::ptrdiff_t>(to + bytes), target.end(), untouched))
      << where();
}

template <typename F>
void for_each_supported_kernel(F&& body) {
  std::size_t count = 0;
  const CopyKernel* const kernels = copy_kernels(&count);
  ASSERT_GE(count, 1U);
  for (std::size_t i = 0; i < count; ++i) {
    if (kernels[i].supported) body(kernels[i]);
  }
}

TEST(CopyKernels, SizesAroundEveryThresholdCopyExactly) {
  for_each_supported_kernel([](const CopyKernel& sut) {
    for (const std::size_t middle :
         {std::size_t{64}, std::size_t{256}, kNonTemporalBytesMin, kNonTemporalBytesMin + 256,
          std::size_t{16384}, std::size_t{16448}, std::size_t{65536}}) {
      for (std::size_t bytes = middle - 3; bytes <= middle + 3; ++bytes) {
        expect_copies(sut, bytes, 0, 0);
        expect_copies(sut, bytes, 5, 11);
      }
    }
    for (const std::size_t bytes : {0U, 1U, 2U, 3U, 1000003U}) expect_copies(sut, bytes, 1, 2);
  });
}

TEST(CopyKernels, EveryAlignmentOfTheTargetAndSomeOfTheSource) {
  for_each_supported_kernel([](const CopyKernel& sut) {
    for (std::size_t to = 0; to < 64; ++to) {
      for (const std::size_t from : {0U, 1U, 8U, 31U, 32U, 63U}) {
        expect_copies(sut, kNonTemporalBytesMin + 777, from, to);
      }
    }
  });
}

TEST(CopyKernels, CandidatesAreSupportedKernelsAndTheFirstIsTaken) {
  const CopyCandidates& candidates = copy_candidates();
  ASSERT_GE(candidates.count, 1U);
  for (std::size_t i = 0; i < candidates.count; ++i) {
    bool found = false;
    for_each_supported_kernel(
        [&](const CopyKernel& kernel) { found |= candidates.kernels[i] == &kernel; });
    EXPECT_TRUE(found) << candidates.kernels[i]->name;
  }
  expect_copies({"copy_bytes", copy_bytes, true}, 1000003, 3, 9);
  expect_copies({"copy_bytes", copy_bytes, true}, 17, 3, 9);
}

}  // namespace
}  // namespace refit
