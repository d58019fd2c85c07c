#include "server/plan_cache.hpp"

#include <algorithm>
#include <optional>

#include "digest/digest.hpp"
#include "plan/text.hpp"
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
  op.source += source_bytes_of(op.cast, skipped);
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

bool on_device(const MappedRegion& region) { return region.kind != RegionKind::host; }

/// The device that all pools of the module are on, or kHostMemory.
Result<int> place_of_pools(const Registration& target) {
  std::optional<int> place;
  for (std::size_t i = 0; i < target.regions.size(); ++i) {
    if (!target.manifest->regions()[i].pool) continue;
    const int one = target.regions[i].place();
    if (place.value_or(one) != one) {
      return fail(Errc::unsupported, target.manifest->label() +
                                         ": its pools are on several devices, or some on the host");
    }
    place = one;
  }
  return place.value_or(kHostMemory);
}

bool has_device_pool(const Registration& target) {
  for (std::size_t i = 0; i < target.regions.size(); ++i) {
    if (target.manifest->regions()[i].pool && on_device(target.regions[i])) return true;
  }
  return false;
}

/// One line for each target whose elements a device casts.
std::vector<std::string> device_casts(const BoundPlan& bound, int pools) {
  std::vector<std::string> found;
  for (const Plan::TensorCast& cast : bound.plan.casts) {
    const TensorSpec& from = bound.source->manifest->tensors()[cast.source];
    const TensorSpec& to = bound.target->manifest->tensors()[cast.target];
    if (!on_device(bound.source->regions[from.region]) &&
        !on_device(bound.target->regions[to.region]) &&
        (to.layer_buffer == kNoLayerBuffer || pools == kHostMemory))
      continue;
    found.push_back("target " + describe(to, bound.target->manifest->label()) + ": source " +
                    describe(from, bound.source->manifest->label()) + " is cast on a device");
  }
  std::sort(found.begin(), found.end());
  return found;
}

/// `copy` is of plan.layer_copies and neither comes from a device nor goes to one.
bool layer_is_hosts(const BoundPlan& bound, const Copy& copy, bool pools_on_device) {
  return !pools_on_device && !on_device(bound.source->regions[copy.source_region]);
}

/// No address yet: the offset in the layer buffer alone.
CopyOp layer_op_of(const BoundPlan& bound, const Copy& copy) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): it is never followed before settle() adds to it
  return op_of(bound, copy, reinterpret_cast<std::byte*>(copy.target_offset));
}

void bind_layers(BoundPlan& bound) {
  const std::size_t buffers = bound.target->manifest->layer_buffers().size();
  bound.residency_words.resize(buffers);
  bound.layer_bytes.resize(buffers);
  bound.layer_begins.resize(buffers);
  const bool pools_on_device = has_device_pool(*bound.target);
  for (const Copy& copy : bound.plan.layer_copies) {
    bound.layer_bytes[copy.target_region] += copy.bytes();
    if (!layer_is_hosts(bound, copy, pools_on_device)) {
      bound.touches_devices = true;
      continue;
    }
    if (bound.layers.empty() || bound.layers.back().buffer != copy.target_region) {
      bound.layers.emplace_back();
      bound.layers.back().buffer = copy.target_region;
      bound.layers.back().first = bound.layer_ops.size();
    }
    bound.layer_ops.push_back(layer_op_of(bound, copy));
    bound.layer_offsets.push_back(copy.target_offset);
    ++bound.layers.back().count;
  }
  // Chunks are cut where the buffer's pages end.
  for (LayerCopies& layer : bound.layers)
    layer.job.prepare(bound.layer_ops.data() + layer.first, layer.count);
}

void bind(BoundPlan& bound) {
  const auto& sources = bound.source->regions;
  const auto& targets = bound.target->regions;
  bound.ops.reserve(bound.plan.copies.size());
  for (const Copy& copy : bound.plan.copies) {
    if (on_device(sources[copy.source_region]) || on_device(targets[copy.target_region])) {
      bound.touches_devices = true;
      continue;
    }
    bound.ops.push_back(
        op_of(bound, copy, targets[copy.target_region].data() + copy.target_offset));
  }
  bind_layers(bound);
  if (!bound.ops.empty() && test_point("copy.skip_tensor")) leave_first_tensor_out(bound);
  bound.job.prepare(bound.ops.data(), bound.ops.size());
}

}  // namespace

CopyOp op_of(const BoundPlan& bound, const Copy& copy, std::byte* target) {
  CopyOp op;
  op.source = bound.source->regions[copy.source_region].data() + copy.source_offset;
  op.target = target;
  op.run_bytes = copy.run_bytes;
  op.loop_count = copy.loop_count;
  op.cast = copy.cast;
  for (std::uint32_t i = 0; i < copy.loop_count; ++i) {
    op.loops[i] = {copy.loops[i].count, copy.loops[i].source_stride_bytes,
                   copy.loops[i].target_stride_bytes};
  }
  return op;
}

bool same_selection(const std::vector<std::string>& held, const Names* asked) {
  const std::size_t count = asked == nullptr ? 0 : asked->size();
  if (held.size() != count) return false;
  for (std::size_t i = 0; i < count; ++i) {
    if (held[i] != view(asked->Get(static_cast<flatbuffers::uoffset_t>(i)))) return false;
  }
  return true;
}

Result<std::unique_ptr<DeviceJob>> BoundPlan::prepare(DeviceAccess& access) const {
  test_point("plan.prepare");
  REFIT_TRY_ASSIGN(Devices* const devices, access.required(target->manifest->label()));
  std::vector<std::string> unpinned;
  const auto require_pinned = [&unpinned](const Registration& of, std::uint32_t index) {
    const MappedRegion& region = of.regions[index];
    if (on_device(region) || region.pinned != nullptr) return;
    unpinned.push_back(of.manifest->label() + ": region " + std::to_string(index) + ": " +
                       region.why_not_pinned);
  };
  std::vector<DeviceOp> wanted;
  for (const Copy& copy : plan.copies) {
    const MappedRegion& from = source->regions[copy.source_region];
    const MappedRegion& to = target->regions[copy.target_region];
    if (!on_device(from) && !on_device(to)) continue;
    require_pinned(*source, copy.source_region);
    require_pinned(*target, copy.target_region);
    wanted.push_back(
        {op_of(*this, copy, to.data() + copy.target_offset), from.place(), to.place()});
  }
  REFIT_TRY_ASSIGN(const int pools, place_of_pools(*target));
  bool layers_wanted = false;
  for (const Copy& copy : plan.layer_copies) {
    if (layer_is_hosts(*this, copy, pools != kHostMemory)) continue;
    layers_wanted = true;
    require_pinned(*source, copy.source_region);
    wanted.push_back({layer_op_of(*this, copy), source->regions[copy.source_region].place(), pools,
                      copy.target_region});
  }
  for (std::uint32_t i = 0; layers_wanted && i < target->regions.size(); ++i) {
    if (target->manifest->regions()[i].pool) require_pinned(*target, i);
  }
  if (!unpinned.empty()) {
    std::sort(unpinned.begin(), unpinned.end());
    unpinned.erase(std::unique(unpinned.begin(), unpinned.end()), unpinned.end());
    return fail(Errc::cuda, "host memory that a device shall copy could not be pinned",
                std::move(unpinned));
  }
  if (wanted.empty()) return std::unique_ptr<DeviceJob>();
  auto made = devices->prepare(wanted);
  if (!made) made.error().details = device_casts(*this, pools);
  return made;
}

Result<void> BoundPlan::settle(const RequestRegion& engine) {
  device_bytes = 0;
  for (std::size_t i = 0; i < residency_words.size(); ++i)
    residency_words[i] = engine.residency[target->residency_base + i].load();
  REFIT_TRY(places.read(*target->manifest, residency_words.data()));
  for (std::size_t i = 0; i < layer_begins.size(); ++i) {
    const LayerPlace& place = places[i];
    // The sabotage of tests: layers on a device keep their old bytes, and a proof must find them.
    const bool written = place.resident && !test_point("copy.skip_layers");
    layer_begins[i] = written ? target->regions[place.region].data() + place.offset : nullptr;
    if (place.resident) device_bytes += layer_bytes[i];
  }
  for (LayerCopies& layer : layers) {
    std::byte* const begin = layer_begins[layer.buffer];
    layer.resident = begin != nullptr;
    if (!layer.resident) continue;
    for (std::size_t i = layer.first; i < layer.first + layer.count; ++i)
      layer_ops[i].target = begin + layer_offsets[i];
  }
  if (device_job != nullptr) device_job->place(layer_begins);
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
