// How streams of many lengths are shared out among threads that hash two at a time.
//
// One thread; no bytes are hashed here.
#include "server/hashing.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

namespace refit::daemon {
namespace {

using Parts = std::vector<std::vector<std::uint32_t>>;
constexpr std::uint64_t kMiB = std::uint64_t{1} << 20;

std::vector<std::uint64_t> random_lengths(std::uint64_t seed, std::size_t count) {
  std::mt19937_64 random(seed);
  std::vector<std::uint64_t> lengths(count);
  for (std::uint64_t& length : lengths) length = (random() >> (random() % 20 + 38)) + 1;
  return lengths;
}

/// How many bytes of a part are hashed while the other lane has nothing to do.
std::uint64_t bytes_alone(const std::vector<std::uint64_t>& lengths,
                          const std::vector<std::uint32_t>& part) {
  std::uint64_t ends[2] = {0, 0};
  for (const std::uint32_t stream : part) *std::min_element(ends, ends + 2) += lengths[stream];
  return ends[0] > ends[1] ? ends[0] - ends[1] : ends[1] - ends[0];
}

TEST(ShareOut, EveryStreamIsInOnePartAndTheLargestComeFirst) {
  for (std::uint64_t seed = 0; seed < 50; ++seed) {
    const auto lengths = random_lengths(seed, 300);
    const Parts parts = share_out(lengths, 2);
    std::vector<std::uint32_t> seen;
    std::uint64_t before = UINT64_MAX;
    for (const auto& part : parts) {
      ASSERT_FALSE(part.empty());
      seen.insert(seen.end(), part.begin(), part.end());
      EXPECT_LE(lengths[part.front()], before);
      before = lengths[part.front()];
      for (const std::uint32_t stream : part) EXPECT_LE(lengths[stream], lengths[part.front()]);
    }
    std::sort(seen.begin(), seen.end());
    std::vector<std::uint32_t> all(lengths.size());
    std::iota(all.begin(), all.end(), 0U);
    EXPECT_EQ(seen, all) << "seed " << seed;
  }
}

TEST(ShareOut, PartsAreSmallBesideTheirFirstStream) {
  const auto lengths = random_lengths(1, 5000);
  for (const auto& part : share_out(lengths, 2)) {
    std::uint64_t bytes = 0;
    for (const std::uint32_t stream : part) bytes += lengths[stream];
    EXPECT_LE(bytes, lengths[part.front()] + std::max(lengths[part.front()], 2 * kMiB));
  }
}

// Goal: the second lane has work to the end. Method: play the lanes of every part, and count the
// bytes that are hashed alone; in a model's lengths, where many are equal, and in random ones.
TEST(ShareOut, BothLanesAreBusyToTheEnd) {
  std::vector<std::vector<std::uint64_t>> models;
  for (std::uint64_t seed = 0; seed < 20; ++seed) models.push_back(random_lengths(seed, 800));
  std::vector<std::uint64_t>& blocks = models.emplace_back();
  for (int block = 0; block < 31; ++block)
    blocks.insert(blocks.end(),
                  {27 * kMiB, 27 * kMiB, 5 * kMiB, 5 * kMiB, 5 * kMiB, 5 * kMiB, 3072});
  for (const auto& lengths : models) {
    std::uint64_t alone = 0;
    for (const auto& part : share_out(lengths, 2)) alone += bytes_alone(lengths, part);
    EXPECT_LT(alone * 20, std::reduce(lengths.begin(), lengths.end()));
  }
}

TEST(ShareOut, AStreamThatIsAThreadsWholeShareStandsAlone) {
  EXPECT_EQ(share_out({5, 100, 3}, 2), (Parts{{1}, {0, 2}}));
  EXPECT_EQ(share_out({7, 7}, 2), (Parts{{1}, {0}}));
  EXPECT_EQ(share_out({7, 7}, 1), (Parts{{1, 0}}));
  // A module's one stream beside all of its tensors, on one core and on two.
  EXPECT_EQ(share_out({10, 10, 10, 30}, 1), (Parts{{3, 2, 1, 0}}));
  EXPECT_EQ(share_out({10, 10, 10, 30}, 2).front(), std::vector<std::uint32_t>{3});
}

TEST(ShareOut, NothingIsNoPart) { EXPECT_TRUE(share_out({}, 2).empty()); }

}  // namespace
}  // namespace refit::daemon
