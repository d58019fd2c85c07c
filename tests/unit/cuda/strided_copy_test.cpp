// What the kernels do, run on the CPU with pointers for addresses: the whole body, thread by
// thread.
//
// Expected bytes are made one element after the other by tests/support/cast_by_definition.hpp.
#include "memory/cuda/kernels/strided_copy.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "memory/copy_pool.hpp"
#include "support/cast_by_definition.hpp"
#include "support/effort.hpp"

namespace refit::cuda {
namespace {

static_assert(StridedCopy::kLoopsMax == CopyOp::kDimsMax);

using Bytes = std::vector<std::byte>;

struct Pointers {
  static const void* to_read(std::uint64_t address, std::size_t) { return to_write(address, 0); }
  static void* to_write(std::uint64_t address, std::size_t) {
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  }
};

std::uint64_t address_of(const void* pointer) { return reinterpret_cast<std::uint64_t>(pointer); }

template <typename Unit>
void run_threads(const StridedCopyTable& table, std::uint64_t threads) {
  for (std::uint64_t i = 0; i < threads; ++i) copy_strided<Unit>(table, i, threads, Pointers{});
}

void run(Cast cast, const StridedCopyTable& table, std::uint64_t threads) {
  switch (cast) {
    case Cast::none:
      return run_threads<PlainUnit>(table, threads);
#define REFIT_X(from, to)    \
  case Cast::from##_to_##to: \
    return run_threads<CastUnit<&cast::from##_to_##to>>(table, threads);
      REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  }
}

/// A table of random copies into one target, and what it must hold then.
class Copies {
 public:
  Copies(Cast cast, std::uint32_t unit_bytes, unsigned seed)
      : cast_(cast),
        random_(seed),
        from_bytes_(cast == Cast::none ? unit_bytes : source_unit_bytes(cast)),
        to_bytes_(cast == Cast::none ? unit_bytes : target_unit_bytes(cast)),
        source_(1 << 17),
        target_(1 << 18) {
    for (std::byte& byte : source_) byte = static_cast<std::byte>(random_());
    for (std::byte& byte : target_) byte = static_cast<std::byte>(random_());
    expected_ = target_;
  }

  void add(std::uint64_t run_units, const std::vector<std::uint64_t>& counts, std::uint32_t part,
           bool aligned) {
    StridedCopy copy{};
    copy.first = table_.units;
    copy.run_units = run_units;
    copy.source_unit_bytes = static_cast<std::uint32_t>(from_bytes_);
    copy.target_unit_bytes = static_cast<std::uint32_t>(to_bytes_);
    copy.part = part;
    copy.loop_count = static_cast<std::uint32_t>(counts.size());
    std::uint64_t source_span = run_units * from_bytes_;
    std::uint64_t target_span = run_units * to_bytes_;
    std::uint64_t runs = 1;
    for (std::size_t i = counts.size(); i-- > 0;) {
      // Padding between the runs, and in the source sometimes none of its own (expanded).
      const std::uint64_t pad = aligned ? to_bytes_ * (random_() % 3) : random_() % 5;
      const std::uint64_t source_stride = random_() % 4 == 0 ? 0 : source_span + pad;
      copy.loops[i] = {counts[i], source_stride, target_span + pad};
      source_span += (counts[i] - 1) * source_stride;
      target_span += (counts[i] - 1) * (target_span + pad);
      runs *= counts[i];
    }
    const std::uint64_t skew = aligned ? 0 : 1 + random_() % 7;
    end_ = (end_ + 15) / 16 * 16 + skew;
    ASSERT_LE(end_ + target_span, target_.size());
    ASSERT_LE(source_span + 16, source_.size());
    const std::uint64_t source = (random_() % (source_.size() - source_span - 15)) / 16 * 16 + skew;
    copy.source = address_of(source_.data() + source);
    // A part begins a little before its first byte.
    const bool in_part = part != StridedCopy::kStays;
    copy.target = in_part ? 8 : address_of(target_.data() + end_);
    if (in_part) begins_[part] = address_of(target_.data() + end_) - 8;
    if (!in_part || !absent(part)) {
      for (std::uint64_t run = 0; run < runs; ++run) {
        std::uint64_t from = source;
        std::uint64_t to = end_;
        std::uint64_t rest = run;
        for (std::size_t i = counts.size(); i-- > 0;) {
          from += rest % counts[i] * copy.loops[i].source_stride_bytes;
          to += rest % counts[i] * copy.loops[i].target_stride_bytes;
          rest /= counts[i];
        }
        refit::test::cast_by_definition(cast_, expected_.data() + to, source_.data() + from,
                                        run_units * to_bytes_);
      }
    } else {
      begins_[part] = 0;
    }
    end_ += target_span;
    table_.units += runs * run_units;
    copies_.push_back(copy);
  }
  void expect_right(std::uint64_t threads) {
    table_.copies = address_of(copies_.data());
    table_.count = copies_.size();
    table_.part_begins = address_of(begins_);
    run(cast_, table_, threads);
    EXPECT_TRUE(target_ == expected_)
        << "cast " << static_cast<int>(cast_) << ", units of " << to_bytes_ << ", " << threads
        << " threads; byte "
        << std::mismatch(target_.begin(), target_.end(), expected_.begin()).first - target_.begin();
  }
  [[nodiscard]] std::uint64_t units() const { return table_.units; }
  static bool absent(std::uint32_t part) { return part % 2 == 1; }

 private:
  Cast cast_;
  std::mt19937 random_;
  std::uint64_t from_bytes_;
  std::uint64_t to_bytes_;
  Bytes source_;
  Bytes target_;
  Bytes expected_;
  std::vector<StridedCopy> copies_;
  StridedCopyTable table_{};
  std::uint64_t begins_[4] = {};
  std::uint64_t end_ = 0;
};

struct Kind {
  Cast cast;
  std::uint32_t unit_bytes;
};

std::vector<Kind> all_kinds() {
  std::vector<Kind> kinds;
  for (const std::uint32_t bytes : {1U, 2U, 4U, 8U}) kinds.push_back({Cast::none, bytes});
  for (std::size_t i = 1; i < kCastCount; ++i) kinds.push_back({static_cast<Cast>(i), 0});
  return kinds;
}

// Goal: every unit is written once, where it belongs, and nothing else is: for tails of every
// length, tiles that several copies share, copies that several tiles share, and any grid.
TEST(StridedCopy, IsRightForEveryCastTailAndGrid) {
  for (const Kind& kind : all_kinds()) {
    for (const std::uint64_t blocks : {1U, 2U, 3U, 16U}) {
      Copies sut(kind.cast, kind.unit_bytes, static_cast<unsigned>(blocks));
      for (std::uint64_t units = 1; units < 20; ++units)
        sut.add(units, {}, StridedCopy::kStays, true);
      sut.add(kTileUnits - 1, {}, StridedCopy::kStays, true);
      sut.add(2 * kTileUnits + 1, {}, StridedCopy::kStays, true);
      for (std::uint64_t units = 1; units < 20; ++units)
        sut.add(units, {}, StridedCopy::kStays, true);
      sut.expect_right(blocks * kLanes);
    }
  }
}

TEST(StridedCopy, IsRightForEveryNumberOfUnitsAroundATile) {
  constexpr std::uint64_t kOfABlock = kLanes;
  for (const std::uint64_t units : {kOfABlock - 1, kOfABlock, kOfABlock + 1, kTileUnits - 1,
                                    kTileUnits, kTileUnits + 1, 2 * kTileUnits}) {
    Copies sut(Cast::float32_to_bfloat16, 0, 1);
    sut.add(units, {}, StridedCopy::kStays, true);
    ASSERT_EQ(sut.units(), units);
    sut.expect_right(2 * kLanes);
  }
}

TEST(StridedCopy, IsRightForStridesOfUpToEightDimensions) {
  for (const Kind& kind : all_kinds()) {
    for (unsigned seed = 0; seed < refit::test::rounds(20); ++seed) {
      Copies sut(kind.cast, kind.unit_bytes, seed);
      sut.add(3, {2, 2, 1, 2, 3, 1, 2, 2}, StridedCopy::kStays, true);
      sut.add(1, {7, 5, 11}, StridedCopy::kStays, true);
      sut.add(5, {13}, StridedCopy::kStays, true);
      sut.add(1, {1}, StridedCopy::kStays, true);
      sut.add(2, {50, 3}, StridedCopy::kStays, true);
      sut.expect_right(2 * kLanes);
    }
  }
}

// Goal: an address that is no multiple of its unit is no failure, which on a device it would be of
// the whole context. Method: UBSan sees a misaligned access.
TEST(StridedCopy, IsRightForEndsAndStridesOfAnyAlignment) {
  for (const Kind& kind : all_kinds()) {
    for (unsigned seed = 0; seed < refit::test::rounds(20); ++seed) {
      Copies sut(kind.cast, kind.unit_bytes, seed);
      for (std::uint64_t i = 0; i < 8; ++i) sut.add(1 + i, {3, 4}, StridedCopy::kStays, false);
      sut.add(1000, {}, StridedCopy::kStays, false);
      sut.expect_right(kLanes);
    }
  }
}

// Goal: parts are written where they begin now, and absent ones are passed over, also in the middle
// of a tile and over several.
TEST(StridedCopy, WritesPartsWhereTheyBeginAndLeavesAbsentOnesOut) {
  for (const Kind& kind : all_kinds()) {
    for (unsigned seed = 0; seed < refit::test::rounds(8); ++seed) {
      for (const bool aligned : {true, false}) {
        Copies sut(kind.cast, kind.unit_bytes, seed);
        sut.add(7, {3}, 0, aligned);
        sut.add(300 + seed, {}, 1, aligned);
        sut.add(5, {}, StridedCopy::kStays, aligned);
        sut.add(kTileUnits + 77, {}, 3, aligned);
        sut.add(9, {11}, 2, aligned);
        sut.add(kLanes * 2 + seed, {}, StridedCopy::kStays, aligned);
        sut.expect_right(2 * kLanes);
      }
    }
  }
}

}  // namespace
}  // namespace refit::cuda
