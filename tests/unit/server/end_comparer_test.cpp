// Whether both ends of copies are equal: any strides, any byte, and nothing beside them.
//
// Method: copies with random loops, done by a byte loop; then one byte of the target is changed,
// inside what was written or in a gap of it.
#include "server/end_comparer.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

namespace refit::daemon {
namespace {

constexpr std::uint64_t kRegionBytes = std::uint64_t{4} << 20;

std::shared_ptr<Registration> registration(const std::string& label, Role role) {
  auto made = std::make_shared<Registration>();
  TensorSpec tensor;
  tensor.name = "all";
  tensor.dtype = DType::uint8;
  tensor.shape = {kRegionBytes};
  const std::uint64_t inode = role == Role::engine ? 1 : 2;
  auto manifest = Manifest::validate(label, role, {tensor}, {{kRegionBytes, 0, inode, false}}, {});
  auto fd = make_memfd(label, kRegionBytes);
  if (!manifest || !fd) return nullptr;
  made->manifest = *manifest;
  auto mapping = Mapping::map(fd->get(), kRegionBytes, Access::read_write, label);
  if (!mapping) return nullptr;
  made->regions.emplace_back();
  made->regions.back().bytes = kRegionBytes;
  made->regions.back().host = std::move(*mapping);
  return made;
}

class EndComparerTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto source = registration("trainer/m", Role::trainer);
    const auto target = registration("engine/m", Role::engine);
    ASSERT_TRUE(source != nullptr && target != nullptr);
    plan_ = std::make_unique<BoundPlan>(source, target);
  }
  std::byte* source() { return plan_->source->regions[0].data(); }
  std::byte* target() { return plan_->target->regions[0].data(); }

  /// Copies byte by byte; returns which bytes of the target were written.
  std::vector<char> execute(const Copy& copy) {
    std::vector<char> written(kRegionBytes);
    std::uint64_t runs = 1;
    for (std::uint32_t i = 0; i < copy.loop_count; ++i) runs *= copy.loops[i].count;
    for (std::uint64_t run = 0; run < runs; ++run) {
      std::uint64_t from = copy.source_offset;
      std::uint64_t to = copy.target_offset;
      std::uint64_t rest = run;
      for (std::uint32_t i = copy.loop_count; i-- > 0;) {
        const std::uint64_t index = rest % copy.loops[i].count;
        rest /= copy.loops[i].count;
        from += index * copy.loops[i].source_stride_bytes;
        to += index * copy.loops[i].target_stride_bytes;
      }
      for (std::uint64_t k = 0; k < copy.run_bytes; ++k) {
        target()[to + k] = source()[from + k];
        written[to + k] = 1;
      }
    }
    return written;
  }
  EndComparer::Answer compare() {
    return sut_.compare(*plan_, [] { return true; });
  }

  std::unique_ptr<BoundPlan> plan_;
  DeviceAccess devices_;
  EndComparer sut_{devices_};
};

/// Loops whose turns do not meet: each stride is at least what the loops within it span.
Copy random_copy(std::mt19937_64& random) {
  const auto upto = [&random](std::uint64_t max) { return random() % (max + 1); };
  Copy copy;
  copy.run_bytes = upto(3) == 0 ? 1 + upto(8) : 1 + upto(5000);
  copy.loop_count = static_cast<std::uint32_t>(upto(4));
  std::uint64_t source_span = copy.run_bytes;
  std::uint64_t target_span = copy.run_bytes;
  for (std::uint32_t i = copy.loop_count; i-- > 0;) {
    const std::uint64_t room = kRegionBytes / 2 / std::max(source_span, target_span);
    const std::uint64_t count = 1 + upto(std::min<std::uint64_t>(room, upto(5) == 0 ? 400 : 7));
    copy.loops[i] = {count, source_span + upto(9), target_span + upto(9)};
    source_span += (count - 1) * copy.loops[i].source_stride_bytes;
    target_span += (count - 1) * copy.loops[i].target_stride_bytes;
  }
  copy.source_offset = upto(100);
  copy.target_offset = upto(100);
  return copy;
}

TEST_F(EndComparerTest, OneChangedByteIsSeenAndAGapIsNot) {
  std::mt19937_64 random(7);
  for (std::uint64_t k = 0; k < kRegionBytes; k += 8) {
    const std::uint64_t value = random();
    std::memcpy(source() + k, &value, 8);
  }
  int gaps = 0;
  for (int round = 0; round < 60; ++round) {
    SCOPED_TRACE("round " + std::to_string(round));
    const Copy copy = random_copy(random);
    const std::vector<char> written = execute(copy);
    plan_->plan.copies = {copy};
    ASSERT_EQ(compare(), EndComparer::Answer::equal);
    std::uint64_t at = copy.target_offset + random() % 5000;
    while (at < kRegionBytes && written[at] == 0) ++at;
    if (at == kRegionBytes) at = copy.target_offset;
    target()[at] ^= std::byte{0x10};
    ASSERT_EQ(compare(), EndComparer::Answer::different);
    target()[at] ^= std::byte{0x10};
    for (at = copy.target_offset; written[at] != 0;) ++at;
    gaps += at < copy.target_offset + 5000 ? 1 : 0;
    target()[at] ^= std::byte{0x10};
    ASSERT_EQ(compare(), EndComparer::Answer::equal);
  }
  EXPECT_GT(gaps, 10);
}

TEST_F(EndComparerTest, EveryBlockOfALongRunIsReadAndMayBeTheLast) {
  Copy copy;
  copy.run_bytes = (std::uint64_t{3} << 20) + 3;
  copy.source_offset = 1;
  copy.target_offset = 2;
  execute(copy);
  plan_->plan.copies = {copy};
  for (const std::uint64_t at : {std::uint64_t{0}, copy.run_bytes / 2, copy.run_bytes - 1}) {
    target()[copy.target_offset + at] ^= std::byte{1};
    EXPECT_EQ(compare(), EndComparer::Answer::different) << at;
    target()[copy.target_offset + at] ^= std::byte{1};
  }
  int blocks = 0;
  const auto two = [&blocks] { return ++blocks < 3; };
  EXPECT_EQ(sut_.compare(*plan_, two), EndComparer::Answer::stopped);
  EXPECT_EQ(blocks, 3);
  EXPECT_EQ(compare(), EndComparer::Answer::equal);
}

}  // namespace
}  // namespace refit::daemon
