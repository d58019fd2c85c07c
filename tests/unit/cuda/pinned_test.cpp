// Host memory pinned in parts, and never in a part of its parts.

#include "memory/cuda/pinned.hpp"

#include "unit/cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

class PinnedRangeTest : public CudaTest {
 protected:
  static Mapping mapping(std::uint64_t bytes, Access access = Access::read_write) {
    const auto fd = make_memfd("pinned", bytes);
    auto mapped = Mapping::map(fd->get(), bytes, access, "pinned");
    EXPECT_TRUE(mapped);
    return std::move(*mapped);
  }
  Result<PinnedRange> pin(const Mapping& memory, Access access = Access::read_write,
                          std::size_t call_bytes_max = PinnedRange::kCallBytesMax) {
    return PinnedRange::pin(context(), memory.data(), memory.bytes(), access, "trainer/x: region 0",
                            call_bytes_max);
  }
};

TEST_F(PinnedRangeTest, OneCallPinsAWholeRegion) {
  const Mapping memory = mapping(6 * kMiB);
  {
    const auto pinned = pin(memory);
    ASSERT_TRUE(pinned) << pinned.error().to_string();
    EXPECT_EQ(held("pinned_ranges"), 1U);
    EXPECT_EQ(held("pinned_bytes"), 6 * kMiB);
    EXPECT_EQ(pinned->bytes(), 6 * kMiB);
    EXPECT_GE(pinned->part_bytes(), pinned->bytes());
  }
  EXPECT_EQ(held("pinned_ranges"), 0U);
}

// The driver refuses calls above a limit; a region of more is pinned in several.
TEST_F(PinnedRangeTest, ARegionAboveTheLimitOfOneCallIsPinnedInParts) {
  configure({{"HOST_REGISTER_MAX", "4M"}});
  const Mapping memory = mapping(7 * kMiB);
  EXPECT_TRUE(refuses(pin(memory), Errc::cuda, "trainer/x: region 0: pinning 7340032 bytes"));
  const auto pinned = pin(memory, Access::read_write, 3 * kMiB);
  ASSERT_TRUE(pinned) << pinned.error().to_string();
  EXPECT_EQ(pinned->part_bytes(), 2 * kMiB);
  EXPECT_EQ(held("pinned_ranges"), 4U);
  EXPECT_EQ(held("pinned_bytes"), 7 * kMiB);
}

TEST_F(PinnedRangeTest, APartThatFailsUndoesTheOthers) {
  const Mapping memory = mapping(6 * kMiB);
  faults("cuMemHostRegister#3=2");
  EXPECT_TRUE(refuses(pin(memory, Access::read_write, 2 * kMiB), Errc::cuda,
                      "2097152 bytes from 4194304 on"));
  faults("");
  EXPECT_EQ(held("pinned_ranges"), 0U);
}

TEST_F(PinnedRangeTest, NothingIsPinnedOfNothing) {
  const std::uint64_t before = calls("cuMemHostRegister");
  const auto pinned = PinnedRange::pin(context(), nullptr, 0, Access::read_write, "empty");
  ASSERT_TRUE(pinned);
  EXPECT_EQ(pinned->bytes(), 0U);
  EXPECT_EQ(calls("cuMemHostRegister"), before);
}

TEST_F(PinnedRangeTest, AReadOnlyMappingIsPinnedAsOne) {
  const Mapping memory = mapping(2 * kMiB, Access::read_only);
  EXPECT_TRUE(pin(memory, Access::read_only));
  EXPECT_FALSE(pin(memory, Access::read_write));
  Device without = devices_->all()[0];
  without.read_only_host_register = false;
  CUcontext handle = nullptr;
  must(cuda().cuDevicePrimaryCtxRetain(&handle, without.ordinal));
  const auto old = std::make_shared<const Context>(devices_->driver(), without, handle);
  EXPECT_TRUE(
      refuses(PinnedRange::pin(old, memory.data(), memory.bytes(), Access::read_only, "trainer/x"),
              Errc::unsupported, "mapped read-only"));
}

TEST_F(PinnedRangeTest, WhatIsPinnedAlreadyIsLeftAlone) {
  const Mapping memory = mapping(4 * kMiB);
  const auto first = pin(memory);
  ASSERT_TRUE(first);
  EXPECT_TRUE(refuses(pin(memory), Errc::bad_argument, "ALREADY_REGISTERED"));
  EXPECT_TRUE(refuses(PinnedRange::pin(context(), memory.data() + 1, kMiB, Access::read_write, "x"),
                      Errc::bad_argument, "whole pages"));
  EXPECT_EQ(held("pinned_ranges"), 1U);
}

// Device memory has no pages of the CPU's: a device pointer where a host pointer belongs.
TEST_F(PinnedRangeTest, ADevicePointerIsNotPinned) {
  const MadeMemory made(Kind::allocation, 2 * kMiB);
  EXPECT_FALSE(PinnedRange::pin(context(), reinterpret_cast<std::byte*>(made.address()), kMiB,
                                Access::read_write, "x"));
}

}  // namespace
}  // namespace refit::cuda::test
