#include "server/plan_cache.hpp"

#include <algorithm>

#include "digest/digest.hpp"
#include "test_point.hpp"

namespace refit::daemon {
namespace {

// The sabotage of the demo: one tensor keeps its old bytes, and the checker must find it. A copy
// may be many adjacent tensors merged, so that it is cut where its second one begins.
void leave_first_tensor_out(BoundPlan& bound) {
  const Copy& copy = bound.plan.copies.front();
  std::uint64_t skipped = copy.run_bytes;
  for (const std::uint32_t index : bound.plan.targets) {
    const TensorSpec& tensor = bound.target->manifest->tensors()[index];
    if (tensor.region == copy.target_region && tensor.offset_bytes > copy.target_offset) {
      skipped = std::min(skipped, tensor.offset_bytes - copy.target_offset);
    }
  }
  CopyOp& op = bound.ops.front();
  if (copy.loop_count != 0 || skipped == copy.run_bytes) {
    bound.ops.erase(bound.ops.begin());
    return;
  }
  op.source += skipped;
  op.target += skipped;
  op.run_bytes -= skipped;
}

/// Names the set of written tensors, so that a transaction which broke a module is known again by
/// what it wrote.
std::uint64_t hash_selection(const BoundPlan& bound) {
  std::vector<std::string_view> names;
  for (const std::uint32_t index : bound.plan.targets) {
    names.push_back(bound.target->manifest->tensors()[index].name);
  }
  std::sort(names.begin(), names.end());
  std::string text;
  for (const std::string_view name : names) text.append(name).push_back('\n');
  return std::max<std::uint64_t>(1, payload_hash(text.data(), text.size()));
}

CopyOp op_of(const BoundPlan& bound, const Copy& copy, std::byte* target) {
  CopyOp op;
  op.source = bound.source->regions[copy.source_region].data() + copy.source_offset;
  op.target = target;
  op.run_bytes = copy.run_bytes;
  op.loop_count = copy.loop_count;
  for (std::uint32_t i = 0; i < copy.loop_count; ++i) {
    op.loops[i] = {copy.loops[i].count, copy.loops[i].source_stride_bytes,
                   copy.loops[i].target_stride_bytes};
  }
  return op;
}

void bind_layers(BoundPlan& bound) {
  const std::vector<Copy>& copies = bound.plan.layer_copies;
  bound.layer_ops.reserve(copies.size());
  for (const Copy& copy : copies) {
    if (bound.layers.empty() || bound.layers.back().buffer != copy.target_region) {
      bound.layers.emplace_back();
      bound.layers.back().buffer = copy.target_region;
      bound.layers.back().first = bound.layer_ops.size();
    }
    // No address yet: the offset alone, so that chunks are cut where the buffer's pages end.
    // NOLINTNEXTLINE(performance-no-int-to-ptr): it is never followed before settle() adds to it
    auto* const offset = reinterpret_cast<std::byte*>(copy.target_offset);
    bound.layer_ops.push_back(op_of(bound, copy, offset));
    ++bound.layers.back().count;
  }
  for (LayerCopies& layer : bound.layers)
    layer.job.prepare(bound.layer_ops.data() + layer.first, layer.count);
  bound.residency_words.resize(bound.target->manifest->layer_buffers().size());
}

void bind(BoundPlan& bound) {
  bound.ops.reserve(bound.plan.copies.size());
  for (const Copy& copy : bound.plan.copies) {
    bound.ops.push_back(
        op_of(bound, copy, bound.target->regions[copy.target_region].data() + copy.target_offset));
  }
  bind_layers(bound);
  if (!bound.ops.empty() && test_point("copy.skip_tensor")) leave_first_tensor_out(bound);
  bound.job.prepare(bound.ops.data(), bound.ops.size());
}

}  // namespace

bool same_selection(const std::vector<std::string>& held, const Names* asked) {
  const std::size_t count = asked == nullptr ? 0 : asked->size();
  if (held.size() != count) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (held[i] != view(asked->Get(static_cast<flatbuffers::uoffset_t>(i)))) return false;
  }
  return true;
}

Result<void> BoundPlan::settle(const RequestRegion& engine) {
  device_bytes = 0;
  for (std::size_t i = 0; i < residency_words.size(); ++i)
    residency_words[i] = engine.residency[target->residency_base + i].load();
  REFIT_TRY(places.read(*target->manifest, residency_words.data()));
  for (LayerCopies& layer : layers) {
    const LayerPlace& place = places[layer.buffer];
    layer.resident = place.resident;
    if (!place.resident) continue;
    std::byte* const begin = target->regions[place.region].data() + place.offset;
    for (std::size_t i = layer.first; i < layer.first + layer.count; ++i)
      layer_ops[i].target = begin + plan.layer_copies[i].target_offset;
    device_bytes += layer.job.bytes();
  }
  return {};
}

Result<std::shared_ptr<BoundPlan>> PlanCache::get(const std::shared_ptr<Registration>& source,
                                                  const std::shared_ptr<Registration>& target,
                                                  const Selection* selection,
                                                  bool allow_unmatched) {
  for (auto entry = entries_.rbegin(); entry != entries_.rend(); ++entry) {
    BoundPlan& bound = **entry;
    if (bound.source != source || bound.target != target ||
        bound.options.allow_unmatched != allow_unmatched ||
        !same_selection(bound.options.selection, selection)) {
      continue;
    }
    std::rotate(entry.base() - 1, entry.base(), entries_.end());
    return entries_.back();
  }
  auto bound = std::make_shared<BoundPlan>(source, target);
  bound->options.allow_unmatched = allow_unmatched;
  REFIT_TRY_ASSIGN(bound->options.selection, decode_tensor_names(selection, "the selection"));
  REFIT_TRY_ASSIGN(bound->plan,
                   Plan::compile(*source->manifest, *target->manifest, bound->options));
  bind(*bound);
  bound->selection_hash = hash_selection(*bound);
  if (entries_.size() == kEntriesMax) entries_.erase(entries_.begin());
  entries_.push_back(bound);
  return bound;
}

void PlanCache::forget(std::uint64_t generation) {
  std::erase_if(entries_, [generation](const auto& bound) {
    return bound->source->generation == generation || bound->target->generation == generation;
  });
}

}  // namespace refit::daemon
