// Whether both ends of copies are equal: any strides, any byte, and nothing beside them; and layers
// where they are on a device, wherever they go meanwhile.
//
// Method: copies with random loops, done by a byte loop; then one byte of the target is changed,
// inside what was written or in a gap of it. Layers are moved from what the comparer asks before
// each block.
#include "server/end_comparer.hpp"

#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "ipc/residency_word.hpp"

namespace refit::daemon {
namespace {

constexpr std::uint64_t kRegionBytes = std::uint64_t{4} << 20;

/// One tensor over all of region 0. With `layers` it is cut into as many, each a layer buffer, and
/// region 1 is a pool.
std::shared_ptr<Registration> registration(const std::string& label, Role role,
                                           std::size_t layers = 0) {
  auto made = std::make_shared<Registration>();
  const std::size_t count = std::max<std::size_t>(1, layers);
  std::vector<TensorSpec> tensors(count);
  for (std::size_t i = 0; i < count; ++i) {
    tensors[i].name = "part" + std::to_string(i);
    tensors[i].dtype = DType::uint8;
    tensors[i].shape = {kRegionBytes / count};
    tensors[i].offset_bytes = i * kRegionBytes / count;
    if (layers != 0) tensors[i].layer_buffer = static_cast<std::uint32_t>(i);
  }
  const std::uint64_t inode = role == Role::engine ? 1 : 2;
  std::vector<RegionInfo> regions{{kRegionBytes, 0, inode, false}};
  if (layers != 0) regions.push_back({kRegionBytes, 0, 3, true});
  auto manifest = Manifest::validate(label, role, tensors, regions, {}, {},
                                     std::vector<std::uint64_t>(layers, kRegionBytes / count));
  if (!manifest) return nullptr;
  made->manifest = *manifest;
  for (std::size_t i = 0; i < regions.size(); ++i) {
    auto fd = make_memfd(label, kRegionBytes);
    if (!fd) return nullptr;
    auto mapping = Mapping::map(fd->get(), kRegionBytes, Access::read_write, label);
    if (!mapping) return nullptr;
    made->regions.emplace_back();
    made->regions.back().bytes = kRegionBytes;
    made->regions.back().host = std::move(*mapping);
  }
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
    return sut_.compare(*plan_, *engine_, [] { return true; });
  }

  std::unique_ptr<BoundPlan> plan_;
  std::unique_ptr<RequestRegion> engine_ = std::make_unique<RequestRegion>();
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
  EXPECT_EQ(sut_.compare(*plan_, *engine_, two), EndComparer::Answer::stopped);
  EXPECT_EQ(blocks, 3);
  EXPECT_EQ(compare(), EndComparer::Answer::equal);
}

// ---- layers

/// Two layers of 2 MiB, which a refit has written in their host places.
class LayersTest : public EndComparerTest {
 protected:
  static constexpr std::uint64_t kLayerBytes = kRegionBytes / 2;

  void SetUp() override {
    const auto source = registration("trainer/m", Role::trainer);
    const auto target = registration("engine/m", Role::engine, 2);
    ASSERT_TRUE(source != nullptr && target != nullptr);
    target->residency_base = 5;
    plan_ = std::make_unique<BoundPlan>(source, target);
    std::mt19937_64 random(3);
    for (std::uint64_t k = 0; k < kRegionBytes; ++k)
      this->source()[k] = static_cast<std::byte>(random());
    std::memcpy(this->target(), this->source(), kRegionBytes);
    Copy all;
    all.run_bytes = kRegionBytes;
    plan_->plan.copies = {all};
    // Each layer by two copies, the second one longer than a block.
    for (std::uint32_t layer = 0; layer < 2; ++layer) {
      for (const auto& [begin, end] : {std::pair{std::uint64_t{0}, std::uint64_t{1000}},
                                       std::pair{std::uint64_t{1000}, kLayerBytes}}) {
        Copy copy;
        copy.source_offset = layer * kLayerBytes + begin;
        copy.target_region = layer;
        copy.target_offset = begin;
        copy.run_bytes = end - begin;
        plan_->plan.layer_copies.push_back(copy);
      }
      say(layer, ResidencyState::absent, 0);
    }
  }

  std::byte* pool() { return plan_->target->regions[1].data(); }
  void say(std::uint32_t layer, ResidencyState state, std::uint64_t offset,
           std::uint8_t region = 1) {
    engine_->residency[5 + layer].store(ResidencyWord{state, region, ++moves_, offset}.pack());
  }
  /// As an engine does: the bytes first, then the word.
  void fetch(std::uint32_t layer, std::uint64_t offset) {
    std::memcpy(pool() + offset, target() + layer * kLayerBytes, kLayerBytes);
    say(layer, ResidencyState::resident, offset);
  }
  static constexpr int kHostBlocks = kRegionBytes >> 20;  ///< which come first
  static constexpr int kLayerBlocks = 3;                  ///< of one layer

  std::uint16_t moves_ = 0;
};

TEST_F(LayersTest, EveryByteOfALayerIsReadWhereItIs) {
  fetch(0, kLayerBytes);
  fetch(1, 0);
  EXPECT_EQ(compare(), EndComparer::Answer::equal);
  for (const std::uint64_t at :
       {std::uint64_t{0}, std::uint64_t{999}, kLayerBytes - 1, kLayerBytes, kRegionBytes - 1}) {
    pool()[at] ^= std::byte{1};
    EXPECT_EQ(compare(), EndComparer::Answer::different) << at;
    pool()[at] ^= std::byte{1};
  }
  EXPECT_EQ(compare(), EndComparer::Answer::equal);
}

TEST_F(LayersTest, AbsentLayersStandAgainstNothing) {
  fetch(0, 0);
  pool()[0] ^= std::byte{1};
  say(0, ResidencyState::absent, 0);
  say(1, ResidencyState::unsaid, 0);
  EXPECT_EQ(compare(), EndComparer::Answer::equal);
}

TEST_F(LayersTest, WordOfNonsenseIsNeverFollowed) {
  say(0, static_cast<ResidencyState>(3), 0);
  EXPECT_EQ(compare(), EndComparer::Answer::unreadable);
  say(0, ResidencyState::resident, 0, 0);
  EXPECT_EQ(compare(), EndComparer::Answer::unreadable);
  say(0, ResidencyState::resident, kRegionBytes - 32);
  EXPECT_EQ(compare(), EndComparer::Answer::unreadable);
  say(0, ResidencyState::resident, ResidencyWord::kOffsetMax - 31);
  EXPECT_EQ(compare(), EndComparer::Answer::unreadable);
}

// Goal: bytes of a place that the layer has left are not held against it. Method: it goes while
// each of its blocks is about to be read, and what comes after it is other bytes.
TEST_F(LayersTest, LayerThatMovesIsReadWhereItWent) {
  for (int block = 0; block < kLayerBlocks; ++block) {
    for (const std::uint64_t to : {kLayerBytes, std::uint64_t{0}}) {
      fetch(0, 0);
      int asked = 0;
      const auto move = [&] {
        if (asked++ != kHostBlocks + block) return true;
        say(0, ResidencyState::absent, 0);
        std::memset(pool(), 0, kLayerBytes);
        fetch(0, to);  // to where it was, too: the generation tells
        return true;
      };
      EXPECT_EQ(sut_.compare(*plan_, *engine_, move), EndComparer::Answer::equal);
      // Every block in one place, however many were read before: other bytes are seen at once, the
      // same ones are found to have moved at the end.
      const int before = to == 0 ? kLayerBlocks : block + 1;
      EXPECT_EQ(asked, kHostBlocks + before + kLayerBlocks) << block;
    }
  }
}

TEST_F(LayersTest, MovedLayerThatIsWrongWhereItWentIsDifferent) {
  fetch(0, 0);
  int asked = 0;
  const auto move = [&] {
    if (asked++ != kHostBlocks + 2) return true;
    fetch(0, kLayerBytes);
    pool()[kLayerBytes] ^= std::byte{1};  // what was read before the move
    return true;
  };
  EXPECT_EQ(sut_.compare(*plan_, *engine_, move), EndComparer::Answer::different);
}

TEST_F(LayersTest, LayerThatNeverStaysCountsAsAbsent) {
  fetch(0, 0);
  fetch(1, kLayerBytes);
  int asked = 0;
  const auto move = [&] {
    if (asked++ < kHostBlocks) return true;
    std::memset(pool(), 0, kLayerBytes);
    say(0, ResidencyState::resident, 0);
    return asked < 100;
  };
  EXPECT_EQ(sut_.compare(*plan_, *engine_, move), EndComparer::Answer::equal);
  // The other one is read nevertheless.
  pool()[kRegionBytes - 1] ^= std::byte{1};
  EXPECT_EQ(sut_.compare(*plan_, *engine_, move), EndComparer::Answer::different);
}

TEST_F(LayersTest, ReadingOfALayerIsStoppedBetweenBlocks) {
  fetch(1, 0);
  int asked = 0;
  const auto two = [&] { return asked++ < kHostBlocks + 2; };
  EXPECT_EQ(sut_.compare(*plan_, *engine_, two), EndComparer::Answer::stopped);
  EXPECT_EQ(asked, kHostBlocks + 3);
}

}  // namespace
}  // namespace refit::daemon
