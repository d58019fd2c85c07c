// Counters and histograms of what a daemon did. One thread.
#include "server/statistics.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <numeric>

namespace refit::daemon {
namespace {

TEST(Statistics, BoundIsTheLastOfItsBucket) {
  Histogram sut;
  for (const float us : {0.0F, 10.0F, 10.5F, 25.0F}) sut.add(us);

  EXPECT_EQ(sut.counts()[0], 2U);
  EXPECT_EQ(sut.counts()[1], 2U);
  EXPECT_EQ(sut.sum_us(), 45.5);
}

TEST(Statistics, WhatIsAboveAllBoundsIsCountedToo) {
  Histogram sut;
  sut.add(1e9F);
  sut.add(std::numeric_limits<float>::infinity());

  EXPECT_EQ(sut.counts().back(), 2U);
}

TEST(Statistics, BoundsGrow) {
  for (std::size_t i = 1; i < Histogram::kBoundsUs.size(); ++i)
    EXPECT_GT(Histogram::kBoundsUs[i], Histogram::kBoundsUs[i - 1]);
}

TEST(Statistics, RefitIsCountedAsCommittedOrByItsReason) {
  Statistics sut;
  sut.committed({1, 2, 3, 0, 6}, 4096);
  sut.committed({1, 2, 3, 0, 6}, 4096);
  sut.failed(Errc::engine_gone);
  sut.failed(static_cast<Errc>(60'000));  // no such code: not counted, and nothing is overwritten

  EXPECT_EQ(sut.committed_count(), 2U);
  EXPECT_EQ(sut.moved_bytes(), 8192U);
  EXPECT_EQ(sut.failures()[static_cast<std::size_t>(Errc::engine_gone)], 1U);
  EXPECT_EQ(std::accumulate(sut.failures().begin(), sut.failures().end(), std::uint64_t{0}), 1U);
  EXPECT_EQ(sut.gate().sum_us(), 4);
  EXPECT_EQ(sut.total().sum_us(), 12);
}

}  // namespace
}  // namespace refit::daemon
