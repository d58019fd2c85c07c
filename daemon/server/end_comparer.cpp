#include "server/end_comparer.hpp"

#include <algorithm>
#include <array>

#include "memory/cast_kernels.hpp"
#include "server/layer_reading.hpp"
#include "server/racing_reads.hpp"

namespace refit::daemon {
namespace {

constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

/// Hands out `op` in blocks of about kBlockBytes, in order, until `take` returns false.
template <typename Take>
void in_blocks(const CopyOp& op, Take&& take) {
  CopyOp block = op;
  if (op.loop_count == 0) {
    for (std::uint64_t at = 0; at < op.run_bytes; at += kBlockBytes) {
      block.source = op.source + source_bytes_of(op.cast, at);
      block.target = op.target + at;
      block.run_bytes = std::min(kBlockBytes, op.run_bytes - at);
      if (!take(block)) return;
    }
    return;
  }
  // Whole loops from the innermost outwards, as many as fit, and then so many turns of the next.
  std::uint32_t first = op.loop_count;
  std::uint64_t bytes = op.run_bytes;
  while (first > 1 && bytes * op.loops[first - 1].count <= kBlockBytes)
    bytes *= op.loops[--first].count;
  const CopyOp::Loop& cut = op.loops[--first];
  const std::uint64_t turns_max = std::max<std::uint64_t>(1, kBlockBytes / bytes);
  block.loop_count = op.loop_count - first;
  std::copy_n(op.loops.begin() + first, block.loop_count, block.loops.begin());
  std::uint64_t outer_turns = 1;
  for (std::uint32_t i = 0; i < first; ++i) outer_turns *= op.loops[i].count;
  for (std::uint64_t outer = 0; outer < outer_turns; ++outer) {
    const auto [source, target] = op.ends_of(outer, first);
    for (std::uint64_t turn = 0; turn < cut.count; turn += turns_max) {
      block.source = source + turn * cut.source_stride_bytes;
      block.target = target + turn * cut.target_stride_bytes;
      block.loops[0].count = std::min(turns_max, cut.count - turn);
      if (!take(block)) return;
    }
  }
}

/// The bytes of a block at one of its ends, as a tensor of bytes.
void view_as_bytes(TensorSpec& bytes, const CopyOp& block, std::uint64_t run_bytes,
                   std::uint64_t CopyOp::Loop::*stride) {
  bytes.dtype = DType::uint8;
  bytes.shape.clear();
  bytes.strides.clear();
  for (std::uint32_t i = 0; i < block.loop_count; ++i) {
    bytes.shape.push_back(block.loops[i].count);
    bytes.strides.push_back(block.loops[i].*stride);
  }
  bytes.shape.push_back(run_bytes);
  bytes.strides.push_back(1);
}

/// Feeds what a copy makes of the source's bytes.
void update_with_written(Hasher& hasher, Cast cast, const TensorView& source) {
  if (cast == Cast::none) return update_with_elements(hasher, source);
  std::array<std::byte, 2048> made;  // short enough to stay in the caches
  ElementReader reader;
  reader.begin(source);
  for (auto piece = reader.next(); !piece.empty();) {
    const std::size_t count =
        std::min(piece.size() / source_unit_bytes(cast), made.size() / target_unit_bytes(cast));
    cast_elements(cast, made.data(), piece.data(), count);
    hasher.update(std::span(made.data(), count * target_unit_bytes(cast)));
    piece = piece.subspan(count * source_unit_bytes(cast));
    if (piece.empty()) piece = reader.next();
  }
}

}  // namespace

EndComparer::Answer EndComparer::compare(const BoundPlan& plan, const RequestRegion& engine,
                                         const GoOn& go_on) {
  ranges_.clear();
  for (const auto& registration : {plan.source, plan.target}) {
    for (const MappedRegion& region : registration->regions) {
      if (region.kind == RegionKind::host)
        ranges_.push_back({region.host.data(), region.host.bytes()});
    }
  }
  for (const Copy& copy : plan.plan.copies) {
    const MappedRegion& target = plan.target->regions[copy.target_region];
    const Answer answer = compare_copy(plan, copy, target, copy.target_offset, go_on);
    if (answer != Answer::equal) return answer;
  }
  const std::vector<Copy>& copies = plan.plan.layer_copies;
  for (auto first = copies.begin(); first != copies.end();) {
    const auto last = std::find_if(first, copies.end(), [first](const Copy& copy) {
      return copy.target_region != first->target_region;
    });
    const Answer answer = compare_layer(plan, engine, {first, last}, go_on);
    if (answer != Answer::equal) return answer;
    first = last;
  }
  return Answer::equal;
}

/// The copies into one layer buffer, all of them in one place of it.
EndComparer::Answer EndComparer::compare_layer(const BoundPlan& plan, const RequestRegion& engine,
                                               std::span<const Copy> copies, const GoOn& go_on) {
  LayerReading layer(*plan.target, engine, copies.front().target_region);
  for (;;) {
    const auto place = layer.look();
    if (!place) return Answer::unreadable;
    if (!place->resident) return Answer::equal;
    const MappedRegion& pool = plan.target->regions[place->region];
    Answer answer = Answer::equal;
    for (const Copy& copy : copies) {
      answer = compare_copy(plan, copy, pool, place->offset + copy.target_offset, go_on);
      if (answer != Answer::equal) break;
    }
    const bool read = answer == Answer::equal || answer == Answer::different;
    if (!read || layer.held_still()) return answer;
  }
}

EndComparer::Answer EndComparer::compare_copy(const BoundPlan& plan, const Copy& copy,
                                              const MappedRegion& target,
                                              std::uint64_t target_offset, const GoOn& go_on) {
  const MappedRegion& source = plan.source->regions[copy.source_region];
  Answer answer = Answer::equal;
  in_blocks(op_of(plan, copy, target.data() + target_offset), [&](const CopyOp& block) {
    answer = go_on() ? compare_block(block, source, target) : Answer::stopped;
    return answer == Answer::equal;
  });
  return answer;
}

EndComparer::Answer EndComparer::compare_block(const CopyOp& block, const MappedRegion& source,
                                               const MappedRegion& target) {
  const RacingReads racing;
  view_as_bytes(source_.bytes, block, block.source_run_bytes(), &CopyOp::Loop::source_stride_bytes);
  view_as_bytes(target_.bytes, block, block.run_bytes, &CopyOp::Loop::target_stride_bytes);
  if (!fetch(source_, source, block.source) || !fetch(target_, target, block.target))
    return Answer::unreadable;
  const bool read = run_guarded(ranges_.data(), ranges_.size(), [&] {
    update_with_written(source_.hasher, block.cast, {&source_.bytes, source_.data});
    update_with_elements(target_.hasher, {&target_.bytes, target_.data});
  });
  if (!read) {
    source_.hasher.reset();
    target_.hasher.reset();
    return Answer::unreadable;
  }
  const Digest written = source_.hasher.finish();
  return written == target_.hasher.finish() ? Answer::equal : Answer::different;
}

bool EndComparer::fetch(End& end, const MappedRegion& region, const std::byte* begin) {
  end.data = begin;
  if (region.kind == RegionKind::host) return true;
  Devices* const devices = devices_.if_there();
  if (devices == nullptr) return false;
  // A strided block on a device comes with all that lies between.
  end.read.clear();
  const auto offset = static_cast<std::uint64_t>(begin - region.data());
  const auto reading = devices->read(*region.device, offset, span_bytes(end.bytes));
  if (!reading) return false;
  for (;;) {
    const auto chunk = (*reading)->next();
    if (!chunk) return false;
    if (chunk->empty()) break;
    end.read.insert(end.read.end(), chunk->begin(), chunk->end());
  }
  end.data = end.read.data();
  return true;
}

}  // namespace refit::daemon
