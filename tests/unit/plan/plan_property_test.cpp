// Properties of plans under random manifests: executed naively, a plan moves every element where an
// element by element reference puts it and nothing else; a damaged manifest is refused; hostile
// numbers break nothing. Every failure prints the seed that makes it again.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "plan/plan.hpp"
#include "plan_support.hpp"
#include "support/cast_by_definition.hpp"

namespace refit::daemon {
namespace {

using namespace testing;  // NOLINT: the tests read as sentences only without the prefix.

constexpr std::uint8_t kUntouched = 0xee;

class Dice {
 public:
  explicit Dice(std::uint64_t seed) : random_(seed) {}
  std::uint64_t roll(std::uint64_t first, std::uint64_t last) {
    return std::uniform_int_distribution<std::uint64_t>(first, last)(random_);
  }
  bool chance(std::uint64_t one_in) { return roll(1, one_in) == 1; }

 private:
  std::mt19937_64 random_;
};

struct Box {
  Dims begin;
  Dims extent;
};

/// Strides of a random order of dimensions with random gaps; the elements that it spans.
std::uint64_t random_layout(Dice& dice, TensorSpec& spec, bool may_expand) {
  if (dice.chance(2)) {
    spec.strides.clear();
    return std::max<std::uint64_t>(1, bytes_of(spec) / element_bytes(spec.dtype));
  }
  const std::size_t dims = spec.shape.size();
  std::vector<std::size_t> order(dims);
  for (std::size_t d = 0; d < dims; ++d) order[d] = d;
  for (std::size_t d = dims; d > 1; --d) std::swap(order[d - 1], order[dice.roll(0, d - 1)]);
  spec.strides.assign(dims, 0);
  std::uint64_t next = dice.chance(3) ? 2 : 1;
  std::uint64_t span = 1;
  for (const std::size_t d : order) {
    const std::uint64_t extent = std::max<std::uint64_t>(spec.shape[d], 1);
    if (may_expand && dice.chance(8)) continue;
    spec.strides[d] = next;
    span += (extent - 1) * next;
    next *= extent;
    if (dice.chance(4)) next += dice.roll(1, 3);
  }
  return span;
}

/// Cuts a box into disjoint ones that together are it.
std::vector<Box> random_cut(Dice& dice, const Box& whole, std::size_t pieces_max) {
  std::vector<Box> boxes = {whole};
  while (boxes.size() < pieces_max && !whole.extent.empty() && !dice.chance(4)) {
    const std::size_t which = dice.roll(0, boxes.size() - 1);
    const std::size_t d = dice.roll(0, whole.extent.size() - 1);
    if (boxes[which].extent[d] < 2) continue;
    const std::uint64_t first = dice.roll(1, boxes[which].extent[d] - 1);
    Box rest = boxes[which];
    rest.begin[d] += first;
    rest.extent[d] -= first;
    boxes[which].extent[d] = first;
    boxes.push_back(rest);
  }
  return boxes;
}

struct Scenario {
  std::vector<TensorSpec> source;
  std::vector<TensorSpec> target;
  std::vector<NameRule> rules;
  std::vector<RegionInfo> source_regions;
  std::vector<RegionInfo> target_regions;
};

void place(Dice& dice, TensorSpec& spec, std::vector<RegionInfo>& regions, bool may_expand) {
  const std::uint64_t bytes = random_layout(dice, spec, may_expand) * element_bytes(spec.dtype);
  spec.region = static_cast<std::uint32_t>(dice.roll(0, regions.size() - 1));
  RegionInfo& region = regions[spec.region];
  spec.offset_bytes = region.bytes + (dice.chance(3) ? dice.roll(1, 9) : 0);
  region.bytes = spec.offset_bytes + bytes;
}

Scenario random_scenario(Dice& dice) {
  Scenario scenario;
  for (std::uint64_t i = 0, count = dice.roll(1, 2); i < count; ++i) {
    scenario.source_regions.push_back(region(0, kTrainerInode + i));
    scenario.target_regions.push_back(region(0, kEngineInode + i));
  }
  constexpr DType kDtypes[] = {DType::uint8, DType::bfloat16, DType::float16, DType::float32,
                               DType::int64};
  constexpr std::size_t kDtypeCount = std::size(kDtypes);
  for (std::uint64_t t = 0, count = dice.roll(1, 5); t < count; ++t) {
    const std::string name = "t" + std::to_string(t);
    Dims global(dice.roll(0, 4));
    for (std::uint64_t& extent : global) extent = dice.chance(12) ? 0 : dice.roll(1, 6);
    TensorSpec to = tensor(name, global, 0, kDtypes[dice.roll(0, kDtypeCount - 1)]);
    to.global_shape = global;
    to.box_offset.assign(global.size(), 0);
    for (std::size_t d = 0; d < global.size(); ++d) {
      if (!dice.chance(3)) continue;
      to.box_offset[d] = dice.roll(0, global[d]);
      to.shape[d] = dice.roll(0, global[d] - to.box_offset[d]);
    }
    place(dice, to, scenario.target_regions, false);

    // Parts along dimension 0, each cut into shards.
    const auto parts =
        static_cast<std::uint32_t>(global.empty() || dice.chance(2) ? 1 : dice.roll(2, 4));
    std::uint64_t row = 0;
    for (std::uint32_t part = 0; part < parts; ++part) {
      Dims part_shape = global;
      if (parts > 1) {
        part_shape[0] = part + 1 == parts ? global[0] - row : dice.roll(0, global[0] - row);
        row += part_shape[0];
      }
      const std::vector<Box> boxes =
          random_cut(dice, {Dims(global.size(), 0), part_shape}, dice.roll(1, 5));
      for (std::size_t shard = 0; shard < boxes.size(); ++shard) {
        TensorSpec from = tensor(name + ".p" + std::to_string(part) + ".s" + std::to_string(shard),
                                 boxes[shard].extent, 0, to.dtype);
        from.global_shape = part_shape;
        from.box_offset = boxes[shard].begin;
        const DType other = kDtypes[dice.roll(0, kDtypeCount - 1)];
        if (cast_between(other, to.dtype)) from.dtype = other;
        place(dice, from, scenario.source_regions, true);
        scenario.source.push_back(from);
      }
      scenario.rules.push_back(
          {"^(" + name + ")\\.p" + std::to_string(part) + "\\.s\\d+$", "\\1", part, parts});
    }
    scenario.target.push_back(to);
  }
  for (RegionInfo& info : scenario.source_regions) info.bytes += dice.roll(0, 5);
  for (RegionInfo& info : scenario.target_regions) info.bytes += dice.roll(0, 5);
  return scenario;
}

Memory random_memory(Dice& dice, const std::vector<RegionInfo>& regions) {
  Memory memory;
  for (const RegionInfo& info : regions) {
    std::vector<std::uint8_t> bytes(info.bytes);
    for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(dice.roll(0, 255));
    memory.push_back(std::move(bytes));
  }
  return memory;
}

/// Calls `visit` with every index of a shape.
template <typename Visit>
void for_each_index(const Dims& shape, const Visit& visit) {
  if (std::find(shape.begin(), shape.end(), 0U) != shape.end()) return;
  Dims index(shape.size(), 0);
  while (true) {
    visit(index);
    std::size_t d = shape.size();
    while (d > 0 && ++index[d - 1] == shape[d - 1]) index[--d] = 0;
    if (d == 0) return;
  }
}

std::uint64_t address(const TensorSpec& spec, const Dims& index) {
  std::uint64_t element = 0;
  for (std::size_t d = 0; d < index.size(); ++d) element += index[d] * spec.strides[d];
  return spec.offset_bytes + element * element_bytes(spec.dtype);
}

/// The reference: each source element is put where its global index says, one by one.
void reference(const Manifest& source, const Manifest& target, const Memory& from, Memory& to) {
  for (std::size_t s = 0; s < source.tensors().size(); ++s) {
    const TensorSpec& in = source.tensors()[s];
    const Manifest::Destination destination = source.destination(s);
    const TensorSpec& out = *target.find(destination.name);
    // Rows of the parts before this one; any shard of a part knows its part's global shape.
    std::uint64_t rows_before = 0;
    for (std::uint32_t part = 0; part < destination.part; ++part) {
      for (std::size_t k = 0; k < source.tensors().size(); ++k) {
        if (source.destination(k).name == destination.name && source.destination(k).part == part) {
          rows_before += source.tensors()[k].global_shape[0];
          break;
        }
      }
    }
    for_each_index(in.shape, [&](const Dims& index) {
      Dims local(index.size());
      for (std::size_t d = 0; d < index.size(); ++d) {
        const std::uint64_t global = index[d] + in.box_offset[d] + (d == 0 ? rows_before : 0);
        if (global < out.box_offset[d] || global >= out.box_offset[d] + out.shape[d]) return;
        local[d] = global - out.box_offset[d];
      }
      test::cast_by_definition(
          *cast_between(in.dtype, out.dtype), to.at(out.region).data() + address(out, local),
          from.at(in.region).data() + address(in, index), element_bytes(out.dtype));
    });
  }
}

ManifestPtr source_of(const Scenario& scenario) {
  return valid(Manifest::validate("trainer/dit", Role::trainer, scenario.source,
                                  scenario.source_regions, scenario.rules));
}

Result<ManifestPtr> target_of(const Scenario& scenario) {
  return Manifest::validate("engine/transformer", Role::engine, scenario.target,
                            scenario.target_regions, {});
}

TEST(PlanProperty, ExecutedPlanEqualsTheElementwiseReference) {
  // Random shapes, boxes, fusions, shards, permuted, padded and expanded layouts on both sides.
  std::size_t strided_copies = 0;
  std::size_t merged = 0;
  std::size_t casts = 0;
  std::size_t merged_casts = 0;
  for (std::uint64_t seed = 0; seed < 2'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Dice dice(seed);
    const Scenario scenario = random_scenario(dice);
    const ManifestPtr source = source_of(scenario);
    const ManifestPtr target = valid(target_of(scenario));
    const Result<Plan> sut = Plan::compile(*source, *target, {});
    ASSERT_TRUE(sut.has_value()) << sut.error().to_string();
    EXPECT_TRUE(sut->whole);

    const Memory from = random_memory(dice, scenario.source_regions);
    Memory expected;
    for (const RegionInfo& info : scenario.target_regions) {
      expected.emplace_back(info.bytes, kUntouched);
    }
    Memory actual = expected;
    reference(*source, *target, from, expected);
    execute(*sut, from, actual);
    ASSERT_EQ(actual, expected);

    std::uint64_t bytes = 0;
    for (const Copy& copy : sut->copies) {
      bytes += copy.bytes();
      if (copy.loop_count > 0) ++strided_copies;
      if (copy.cast != Cast::none) ++casts;
      if (copy.cast != Cast::none && copy.run_bytes > target_unit_bytes(copy.cast)) ++merged_casts;
      for (std::uint32_t i = 0; i + 1 < copy.loop_count; ++i) {
        EXPECT_GT(copy.loops[i].target_stride_bytes, copy.loops[i + 1].target_stride_bytes)
            << "loops are outermost first";
      }
    }
    EXPECT_EQ(bytes, sut->bytes);
    EXPECT_EQ(bytes, target->bytes());
    if (sut->copies.size() < scenario.target.size()) ++merged;
    EXPECT_TRUE(
        std::is_sorted(sut->copies.begin(), sut->copies.end(), [](const Copy& a, const Copy& b) {
          return std::pair(a.target_region, a.target_offset) <
                 std::pair(b.target_region, b.target_offset);
        }));
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(strided_copies, 1'000U);
  EXPECT_GT(merged, 100U);
  EXPECT_GT(casts, 1'000U);
  EXPECT_GT(merged_casts, 200U);
}

TEST(PlanProperty, SelectionWritesTheSelectedTensorsAndNothingElse) {
  for (std::uint64_t seed = 0; seed < 1'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Dice dice(seed);
    const Scenario scenario = random_scenario(dice);
    const ManifestPtr source = source_of(scenario);
    const ManifestPtr target = valid(target_of(scenario));
    PlanOptions options;
    std::vector<bool> chosen;
    for (const TensorSpec& spec : scenario.target) {
      chosen.push_back(dice.chance(2));
      if (chosen.back()) options.selection.push_back(spec.name);
    }
    if (options.selection.empty()) continue;
    const Result<Plan> sut = Plan::compile(*source, *target, options);
    ASSERT_TRUE(sut.has_value()) << sut.error().to_string();

    const Memory from = random_memory(dice, scenario.source_regions);
    Memory all;
    for (const RegionInfo& info : scenario.target_regions) all.emplace_back(info.bytes, kUntouched);
    Memory actual = all;
    Memory expected = all;
    reference(*source, *target, from, all);
    for (std::size_t t = 0; t < target->tensors().size(); ++t) {
      const TensorSpec& spec = target->tensors()[t];
      if (!chosen[t]) continue;
      for_each_index(spec.shape, [&](const Dims& index) {
        std::memcpy(expected[spec.region].data() + address(spec, index),
                    all[spec.region].data() + address(spec, index), element_bytes(spec.dtype));
      });
    }
    execute(*sut, from, actual);
    ASSERT_EQ(actual, expected);
    EXPECT_EQ(sut->targets.size(), options.selection.size());
  }
}

TEST(PlanProperty, LostOrDoubledShardIsRefusedExactlyIfItMatters) {
  // Goal: coverage is exact. Method: drop or double one random shard; the plan must be refused if
  // the shard brings an element to its target's box, or was the last of its part or target.
  constexpr std::uint8_t kMark = 0x3c;  // A number that no cast makes zero.
  std::size_t refused = 0;
  for (std::uint64_t seed = 0; seed < 2'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Dice dice(seed);
    Scenario scenario = random_scenario(dice);
    const std::size_t victim = dice.roll(0, scenario.source.size() - 1);
    const bool doubled = dice.chance(2);
    const ManifestPtr before = source_of(scenario);
    const ManifestPtr target = valid(target_of(scenario));

    // By the reference: does any byte of the target depend on the victim alone?
    Scenario only = scenario;
    Memory from;
    Memory to;
    for (const RegionInfo& info : scenario.source_regions) from.emplace_back(info.bytes, 0);
    for (const RegionInfo& info : scenario.target_regions) to.emplace_back(info.bytes, 0);
    const TensorSpec& spec = before->tensors()[victim];
    // Other tensors may not share the victim's bytes: layouts of a region never overlap.
    for_each_index(spec.shape, [&](const Dims& index) {
      std::fill_n(from[spec.region].begin() + static_cast<std::ptrdiff_t>(address(spec, index)),
                  element_bytes(spec.dtype), kMark);
    });
    reference(*before, *target, from, to);
    bool matters = std::any_of(to.begin(), to.end(), [](const std::vector<std::uint8_t>& bytes) {
      return std::any_of(bytes.begin(), bytes.end(), [](std::uint8_t byte) { return byte != 0; });
    });
    if (doubled) {
      TensorSpec twin = scenario.source[victim];
      twin.name += "0";
      scenario.source.push_back(twin);
    } else {
      const auto same_part = [&](std::size_t i) {
        return before->destination(i).name == before->destination(victim).name &&
               before->destination(i).part == before->destination(victim).part;
      };
      std::size_t siblings = 0;
      for (std::size_t i = 0; i < scenario.source.size(); ++i) siblings += same_part(i) ? 1U : 0U;
      if (siblings == 1) matters = true;
      scenario.source.erase(scenario.source.begin() + static_cast<std::ptrdiff_t>(victim));
    }
    const Result<Plan> sut = Plan::compile(*source_of(scenario), *target, {});
    ASSERT_EQ(sut.has_value(), !matters) << (doubled ? "doubled " : "dropped ") << spec.name;
    if (!sut) {
      ++refused;
      EXPECT_EQ(sut.error().details.size(), 1U) << sut.error().to_string();
    }
  }
  EXPECT_GT(refused, 500U);
}

TEST(PlanProperty, RandomHostileManifestsNeverBreakAnything) {
  // Goal: no overflow and no crash, and a plan that is granted stays inside the regions and within
  // the target's tensors; the sanitizers watch. Method: specs of boundary values, one region of
  // 2^64-1 bytes on each side so that many are valid, targets that are like the sources or not.
  __extension__ using Wide = unsigned __int128;
  constexpr std::uint64_t kMost = std::numeric_limits<std::uint64_t>::max();
  std::size_t compiled = 0;
  std::size_t granted = 0;
  for (std::uint64_t seed = 0; seed < 20'000; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Dice dice(seed);
    const auto value = [&]() -> std::uint64_t {
      switch (dice.roll(0, 4)) {
        case 0:
          return 1ULL << dice.roll(0, 63);
        case 1:
          return (1ULL << dice.roll(0, 63)) - 1;
        case 2:
          return dice.chance(8) ? kMost - dice.roll(0, 2) : 1;
        default:
          return dice.roll(0, 4);
      }
    };
    const auto dims = [&](std::size_t count) {
      Dims list(count);
      for (std::uint64_t& entry : list) entry = value();
      return list;
    };
    const auto random_spec = [&]() {
      TensorSpec spec;
      const std::size_t count = dice.roll(0, 3);
      spec.name = std::string(1, static_cast<char>('a' + dice.roll(0, 2)));
      constexpr DType kDtypes[] = {DType::uint8, DType::float32, DType::float16};
      spec.dtype = kDtypes[dice.roll(0, 2)];
      spec.shape = dims(count);
      if (dice.chance(2)) spec.strides = dims(count);
      if (dice.chance(3)) {
        spec.global_shape = dims(count);
        spec.box_offset = Dims(count, 0);
        for (std::uint64_t& entry : spec.box_offset) entry = dice.chance(2) ? 0 : value();
      }
      spec.offset_bytes = dice.chance(2) ? 0 : value();
      return spec;
    };
    std::vector<TensorSpec> source;
    std::vector<TensorSpec> target;
    for (std::uint64_t i = 0, count = dice.roll(1, 2); i < count; ++i) {
      target.push_back(random_spec());
      target.back().name = std::string(1, static_cast<char>('a' + i));
    }
    for (std::uint64_t i = 0, count = dice.roll(1, 3); i < count; ++i) {
      TensorSpec spec = random_spec();
      if (dice.chance(2)) {
        const TensorSpec& like = target[dice.roll(0, target.size() - 1)];
        spec.shape = like.shape;
        spec.global_shape = like.global_shape;
        spec.box_offset = like.box_offset;
        spec.strides = dice.chance(2) ? Dims{} : dims(like.shape.size());
        if (dice.chance(2) || !cast_between(spec.dtype, like.dtype)) spec.dtype = like.dtype;
        spec.name = like.name;
      }
      spec.name += std::to_string(i);
      source.push_back(spec);
    }
    const std::vector<NameRule> rules =
        dice.chance(2) ? std::vector<NameRule>{{"(.)\\d", "\\1"}}
                       : std::vector<NameRule>{{"(.)0", "\\1", 0, 2}, {"(.)\\d", "\\1", 1, 2}};
    const std::uint64_t target_inode = dice.chance(4) ? kTrainerInode : kEngineInode;
    const auto from = Manifest::validate("trainer/dit", Role::trainer, source,
                                         {region(kMost, kTrainerInode)}, rules);
    const auto to = Manifest::validate("engine/transformer", Role::engine, target,
                                       {region(kMost, target_inode)}, {});
    if (!from || !to) continue;
    ++compiled;
    PlanOptions options;
    if (dice.chance(3)) options.selection = {"a"};
    options.allow_unmatched = dice.chance(2);
    const Result<Plan> sut = Plan::compile(**from, **to, options);
    if (!sut) {
      ASSERT_EQ(sut.error().code, Errc::manifest_mismatch);
      ASSERT_FALSE(sut.error().details.empty());
      continue;
    }
    ++granted;
    std::uint64_t bytes = 0;
    for (const Copy& copy : sut->copies) {
      Wide source_end = Wide{copy.source_offset} + copy.source_run_bytes();
      Wide target_end = Wide{copy.target_offset} + copy.run_bytes;
      for (std::uint32_t i = 0; i < copy.loop_count; ++i) {
        source_end += Wide{copy.loops[i].count - 1} * copy.loops[i].source_stride_bytes;
        target_end += Wide{copy.loops[i].count - 1} * copy.loops[i].target_stride_bytes;
      }
      ASSERT_TRUE(source_end <= kMost && target_end <= kMost);
      bytes += copy.bytes();
    }
    ASSERT_EQ(bytes, sut->bytes);
    if (sut->whole) {
      ASSERT_EQ(bytes, (*to)->bytes());
    }
  }
  EXPECT_GT(compiled, 2'000U);
  EXPECT_GT(granted, 200U);
}

}  // namespace
}  // namespace refit::daemon
