#include "server/plan_cache.hpp"

#include <algorithm>

#include "test_point.hpp"

namespace refit::daemon {
namespace {

bool same_selection(const std::vector<std::string>& held, const PlanCache::Selection* asked) {
  const std::size_t count = asked == nullptr ? 0 : asked->size();
  if (held.size() != count) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (held[i] != view(asked->Get(static_cast<flatbuffers::uoffset_t>(i)))) return false;
  }
  return true;
}

void bind(BoundPlan& bound) {
  bound.ops.reserve(bound.plan.copies.size());
  for (const Copy& copy : bound.plan.copies) {
    CopyOp op;
    op.source = bound.source->regions[copy.source_region].data() + copy.source_offset;
    op.target = bound.target->regions[copy.target_region].data() + copy.target_offset;
    op.run_bytes = copy.run_bytes;
    op.loop_count = copy.loop_count;
    for (std::uint32_t i = 0; i < copy.loop_count; ++i) {
      op.loops[i] = {copy.loops[i].count, copy.loops[i].source_stride_bytes,
                     copy.loops[i].target_stride_bytes};
    }
    bound.ops.push_back(op);
  }
  // The sabotage of the demo: one copy is left out, and the checker must find it.
  if (!bound.ops.empty() && test_point("copy.skip_tensor")) bound.ops.pop_back();
  bound.job.prepare(bound.ops.data(), bound.ops.size());
}

}  // namespace

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
  auto bound = std::make_shared<BoundPlan>();
  bound->source = source;
  bound->target = target;
  bound->options.allow_unmatched = allow_unmatched;
  if (selection != nullptr) {
    for (const auto* name : *selection) bound->options.selection.emplace_back(view(name));
  }
  REFIT_TRY_ASSIGN(bound->plan,
                   Plan::compile(*source->manifest, *target->manifest, bound->options));
  bind(*bound);
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
