// Numbers as a person reads them. One thread.
#include "refitctl/format/units.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace refit::ctl {
namespace {

TEST(Units, BytesHaveThreeDigitsAndABinaryUnit) {
  EXPECT_EQ(format_bytes(0), "0 B");
  EXPECT_EQ(format_bytes(1023), "1023 B");
  EXPECT_EQ(format_bytes(1024), "1.00 KiB");
  EXPECT_EQ(format_bytes(1536), "1.50 KiB");
  EXPECT_EQ(format_bytes(10 * 1024), "10.0 KiB");
  EXPECT_EQ(format_bytes(200 * 1024), "200 KiB");
  EXPECT_EQ(format_bytes(7'750'000'000), "7.22 GiB");
}

TEST(Units, BytesThatRoundUpTakeTheNextUnit) {
  EXPECT_EQ(format_bytes((1ULL << 20U) - 1), "1.00 MiB");
  EXPECT_EQ(format_bytes(10 * 1024 - 1), "10.0 KiB");
  EXPECT_EQ(format_bytes(std::numeric_limits<std::uint64_t>::max()), "16.0 EiB");
}

TEST(Units, DurationsTakeTheUnitThatFits) {
  EXPECT_EQ(format_duration_us(0), "0.0 us");
  EXPECT_EQ(format_duration_us(12.34), "12.3 us");
  EXPECT_EQ(format_duration_us(999.9), "1.00 ms");
  EXPECT_EQ(format_duration_us(4'560), "4.56 ms");
  EXPECT_EQ(format_duration_us(999'900), "1.00 s");
  EXPECT_EQ(format_duration_us(95e6), "95.0 s");
}

TEST(Units, WhatIsNoTimeIsADash) {
  for (const double us : {-1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_EQ(format_duration_us(us), "-");
    EXPECT_EQ(format_us(us), "-");
    EXPECT_EQ(format_rate(1, us), "-");
  }
}

TEST(Units, MicrosecondsOfAColumnHaveNoUnit) {
  EXPECT_EQ(format_us(0), "0.0");
  EXPECT_EQ(format_us(12.34), "12.3");
  EXPECT_EQ(format_us(999.99), "1000");
  EXPECT_EQ(format_us(456'789.4), "456789");
  // The largest double is a number too.
  EXPECT_EQ(format_us(std::numeric_limits<double>::max()).size(), 309U);
}

TEST(Units, UptimeHasTwoUnits) {
  EXPECT_EQ(format_uptime(999'999), "0 s");
  EXPECT_EQ(format_uptime(42'000'000), "42 s");
  EXPECT_EQ(format_uptime(187'000'000), "3 min 07 s");
  EXPECT_EQ(format_uptime(3'600'000'000ULL * 5 + 9 * 60'000'000ULL), "5 h 09 min");
  EXPECT_EQ(format_uptime(3'600'000'000ULL * (12 * 24 + 4)), "12 d 4 h");
}

TEST(Units, RatesAreDecimalGigabytes) {
  EXPECT_EQ(format_rate(10'400'000'000, 1e6), "10.4 GB/s");
  EXPECT_EQ(format_rate(0, 1e6), "-");
  EXPECT_EQ(format_rate(1, 0), "-");
}

}  // namespace
}  // namespace refit::ctl
