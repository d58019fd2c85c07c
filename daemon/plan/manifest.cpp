// The checks of one manifest; see manifest.hpp. Pure, any thread.
//
// Three passes: each tensor by itself, names (duplicates, the name map), then an engine's tensors
// against each other. A pass looks only at tensors that the passes before found usable, so that one
// mistake is reported once.
#include "plan/manifest.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <map>
#include <numeric>
#include <tuple>
#include <utility>

#include "plan/arithmetic.hpp"
#include "plan/name_map.hpp"
#include "plan/text.hpp"

namespace refit::daemon {
namespace {

// Bytes of names times instructions of patterns: what matching may cost at worst. The largest real
// manifest needs 1.3e7, which is a millisecond; patterns made to be slow take one or two ns a unit.
constexpr std::uint64_t kMatchWorkMax = std::uint64_t{1} << 27;

std::string subject(const TensorSpec& tensor, std::size_t index) {
  std::string text = "tensor " + in_quotes(tensor.name);
  if (tensor.name.empty()) text += " (number " + number(index) + ")";
  return text;
}

Dims contiguous_strides(const Dims& shape) {
  Dims strides(shape.size());
  std::uint64_t stride = 1;
  for (std::size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    // Only the strides of an empty tensor can overflow here, and nothing is ever read through them.
    const MaybeBytes next = checked_multiply(stride, std::max<std::uint64_t>(shape[d], 1));
    stride = next.value_or(std::numeric_limits<std::uint64_t>::max());
  }
  return strides;
}

// Sufficient, not necessary: each dimension steps over everything that the smaller ones reach.
bool overlaps_itself(const Dims& shape, const Dims& strides) {
  struct Dim {
    std::uint64_t stride = 0;
    std::uint64_t extent = 0;
  };
  std::array<Dim, Manifest::kDimsMax> dims{};
  std::size_t count = 0;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    if (shape[d] > 1) dims[count++] = {strides[d], shape[d]};
  }
  sort_few(dims.data(), count, [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  std::uint64_t reach = 0;  // Bounded by the tensor's span, which is known to fit.
  for (std::size_t i = 0; i < count; ++i) {
    if (dims[i].stride <= reach) return true;
    reach += dims[i].stride * (dims[i].extent - 1);
  }
  return false;
}

// ---- one tensor by itself

struct TensorCheck {
  const std::vector<RegionInfo>& regions;
  const std::vector<std::uint64_t>& layer_buffers;
  const ManifestLimits& limits;
  Role role;
  std::vector<std::string>& problems;

  /// Fills in what the client left out. Returns the tensor's bytes, nullopt if anything is wrong
  /// with more than its name.
  MaybeBytes check(TensorSpec& tensor, std::size_t index) {
    bool usable = true;
    const auto report = [&](const std::string& what) {
      problems.push_back(subject(tensor, index) + ": " + what);
      usable = false;
    };
    const std::uint64_t element = element_bytes(tensor.dtype);
    if (element == 0) {
      report("dtype number " + number(static_cast<std::uint8_t>(tensor.dtype)) + " is unknown");
    }
    const bool region_exists = tensor.region < regions.size();
    if (!region_exists) {
      report("region " + number(tensor.region) + " does not exist, the manifest has " +
             number(regions.size()));
    }
    const std::size_t dims = tensor.shape.size();
    const std::size_t dims_max = std::min(limits.dims_max, Manifest::kDimsMax);
    if (dims > dims_max) {
      report("it has " + number(dims) + " dimensions, the limit is " + number(dims_max));
      return std::nullopt;
    }
    const MaybeBytes elements = element_count(tensor.shape);
    const MaybeBytes bytes =
        elements ? checked_multiply(*elements, std::max<std::uint64_t>(element, 1)) : std::nullopt;
    if (!bytes) {
      report("the bytes of shape " + shape_repr(tensor.shape) + " overflow 64 bits");
    }
    if (tensor.strides.empty()) tensor.strides = contiguous_strides(tensor.shape);
    if (tensor.strides.size() != dims) {
      report("it has " + number(tensor.strides.size()) + " strides for " + number(dims) +
             " dimensions");
    }
    check_box(tensor, report);
    if (region_exists && regions[tensor.region].pool)
      report("it lies in region " + number(tensor.region) + ", which is a pool");
    if (!usable) return std::nullopt;

    const RegionInfo& region = regions[tensor.region];
    const MaybeBytes span = span_elements(tensor.shape, tensor.strides);
    const MaybeBytes span_bytes = span ? checked_multiply(*span, element) : std::nullopt;
    const MaybeBytes end =
        span_bytes ? checked_add(tensor.offset_bytes, *span_bytes) : std::nullopt;
    if (!end || *end > region.bytes) {
      report("shape " + shape_repr(tensor.shape) + " with strides " + shape_repr(tensor.strides) +
             " at offset " + number(tensor.offset_bytes) + " ends " +
             (end ? "at byte " + number(*end) : std::string("beyond 64 bits")) + ", region " +
             number(tensor.region) + " has " + number(region.bytes) + " bytes");
    } else if (role == Role::engine && !is_empty(tensor.shape) &&
               overlaps_itself(tensor.shape, tensor.strides)) {
      report("strides " + shape_repr(tensor.strides) + " make shape " + shape_repr(tensor.shape) +
             " overlap itself, so it cannot be written");
    }
    if (usable) check_layer(tensor, *span_bytes, report);
    return usable ? bytes : std::nullopt;
  }

  template <typename Report>
  void check_layer(const TensorSpec& tensor, std::uint64_t span_bytes, const Report& report) const {
    if (tensor.layer_buffer == kNoLayerBuffer) return;
    if (tensor.layer_buffer >= layer_buffers.size()) {
      report("layer buffer " + number(tensor.layer_buffer) + " does not exist, the manifest has " +
             number(layer_buffers.size()));
      return;
    }
    const std::uint64_t bytes = layer_buffers[tensor.layer_buffer];
    const MaybeBytes end = checked_add(tensor.layer_offset_bytes, span_bytes);
    if (!end || *end > bytes) {
      report("its " + number(span_bytes) + " bytes at offset " + number(tensor.layer_offset_bytes) +
             " leave layer buffer " + number(tensor.layer_buffer) + ", which has " + number(bytes) +
             " bytes");
    }
  }

  template <typename Report>
  static void check_box(TensorSpec& tensor, const Report& report) {
    const std::size_t dims = tensor.shape.size();
    if (tensor.global_shape.empty() && tensor.box_offset.empty()) {
      tensor.global_shape = tensor.shape;
      tensor.box_offset.assign(dims, 0);
      return;
    }
    if (tensor.global_shape.size() != dims || tensor.box_offset.size() != dims) {
      report("its box has " + number(tensor.box_offset.size()) + " offsets and " +
             number(tensor.global_shape.size()) + " global extents for " + number(dims) +
             " dimensions");
      return;
    }
    for (std::size_t d = 0; d < dims; ++d) {
      const MaybeBytes end = checked_add(tensor.box_offset[d], tensor.shape[d]);
      if (!end || *end > tensor.global_shape[d]) {
        report("box " + shape_repr(tensor.shape) + " at " + shape_repr(tensor.box_offset) +
               " leaves its global shape " + shape_repr(tensor.global_shape) + " in dimension " +
               number(d));
        return;
      }
    }
    const MaybeBytes elements = element_count(tensor.global_shape);
    const std::uint64_t element = std::max<std::size_t>(element_bytes(tensor.dtype), 1);
    if (!elements || !checked_multiply(*elements, element)) {
      report("the bytes of global shape " + shape_repr(tensor.global_shape) + " overflow 64 bits");
    }
  }
};

// ---- an engine's tensors against each other

struct Placed {
  std::uint32_t tensor = 0;
  std::uint64_t device = 0;
  std::uint64_t inode = 0;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  bool dense = false;  ///< every byte of the span is the tensor's
};

struct OverlapPair {
  std::uint32_t a = 0;
  std::uint32_t b = 0;
  bool certain = false;
};

/// Finds overlaps within one cluster: tensors of one memory whose spans hang together.
///
/// Strided spans may interleave without a common byte. Seen modulo a stride S, all dimensions whose
/// stride is a multiple of S vanish, and what is left of a tensor is an interval of residues (all
/// of [0, S) where it would wrap). Tensors that are apart in span or in residues are apart in
/// memory. So each tensor is a rectangle, span times residues, and a sweep along the span finds
/// rectangles that meet in n log n. With S = 0 residues are not looked at.
class ClusterSweep {
 public:
  ClusterSweep(const std::vector<TensorSpec>& tensors, const Placed* first, const Placed* last)
      : tensors_(tensors), first_(first), last_(last) {}

  std::vector<OverlapPair> run() const {
    const Placed* strided = std::find_if(first_, last_, [](const Placed& p) { return !p.dense; });
    if (strided == last_) return sweep(0);
    const TensorSpec& model = tensors_[strided->tensor];
    std::vector<std::uint64_t> moduli;
    for (std::size_t d = 0; d < model.shape.size(); ++d) {
      if (model.shape[d] > 1) moduli.push_back(model.strides[d] * element_bytes(model.dtype));
    }
    std::sort(moduli.rbegin(), moduli.rend());
    std::vector<OverlapPair> best = sweep(0);
    for (const std::uint64_t modulus : moduli) {
      if (best.empty()) break;
      std::vector<OverlapPair> found = sweep(modulus);
      if (found.size() < best.size()) best = std::move(found);
    }
    return best;
  }

 private:
  struct Active {
    std::uint64_t residue_end = 0;
    const Placed* placed = nullptr;
  };

  std::pair<std::uint64_t, std::uint64_t> residues(const Placed& placed,
                                                   std::uint64_t modulus) const {
    if (modulus == 0) return {0, 1};
    const TensorSpec& tensor = tensors_[placed.tensor];
    const std::uint64_t element = element_bytes(tensor.dtype);
    std::uint64_t length = element;  // No more than the span, which fits.
    for (std::size_t d = 0; d < tensor.shape.size(); ++d) {
      if (tensor.shape[d] < 2) continue;
      const std::uint64_t stride = tensor.strides[d] * element;
      if (stride % modulus != 0) length += (tensor.shape[d] - 1) * stride;
    }
    // From the cluster's begin, so that a matrix that starts anywhere has its columns in one row.
    const std::uint64_t begin = (placed.begin - first_->begin) % modulus;
    if (length > modulus - begin) return {0, modulus};
    return {begin, begin + length};
  }

  std::vector<OverlapPair> sweep(std::uint64_t modulus) const {
    std::vector<OverlapPair> found;
    std::map<std::uint64_t, Active> active;  // By first residue; their residues are disjoint.
    for (const Placed* placed = first_; placed != last_; ++placed) {
      const auto [begin, end] = residues(*placed, modulus);
      auto it = active.upper_bound(begin);
      if (it != active.begin() && std::prev(it)->second.residue_end > begin) --it;
      bool keep = true;
      while (it != active.end() && it->first < end) {
        const Placed& other = *it->second.placed;
        if (other.end > placed->begin) {
          found.push_back({other.tensor, placed->tensor, other.dense && placed->dense});
          // The one that reaches further stands for both; each turn erases one or is the last.
          if (other.end >= placed->end) {
            keep = false;
            break;
          }
        }
        it = active.erase(it);
      }
      if (keep) active.emplace(begin, Active{end, placed});
    }
    return found;
  }

  const std::vector<TensorSpec>& tensors_;
  const Placed* first_;
  const Placed* last_;
};

enum class Where { regions, layer_buffers };

/// Where the tensors that have bytes lie, in order of memory and offset; each layer buffer is a
/// memory of its own. `usable` may be null: all.
std::vector<Placed> place_tensors(const std::vector<TensorSpec>& tensors,
                                  const std::vector<RegionInfo>& regions,
                                  const std::vector<bool>* usable, Where where = Where::regions) {
  std::vector<Placed> placed;
  placed.reserve(tensors.size());
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const TensorSpec& tensor = tensors[i];
    if ((usable != nullptr && !(*usable)[i]) || is_empty(tensor.shape)) continue;
    const std::uint64_t element = element_bytes(tensor.dtype);
    const std::uint64_t span = *span_elements(tensor.shape, tensor.strides) * element;
    const bool dense = span == *element_count(tensor.shape) * element;
    if (where == Where::layer_buffers) {
      if (tensor.layer_buffer == kNoLayerBuffer) continue;
      placed.push_back({static_cast<std::uint32_t>(i), 0, tensor.layer_buffer,
                        tensor.layer_offset_bytes, tensor.layer_offset_bytes + span, dense});
      continue;
    }
    const RegionInfo& region = regions[tensor.region];
    placed.push_back({static_cast<std::uint32_t>(i), region.device, region.inode,
                      tensor.offset_bytes, tensor.offset_bytes + span, dense});
  }
  std::sort(placed.begin(), placed.end(), [](const Placed& a, const Placed& b) {
    return std::tie(a.device, a.inode, a.begin, a.end, a.tensor) <
           std::tie(b.device, b.inode, b.begin, b.end, b.tensor);
  });
  return placed;
}

void check_overlaps(const std::vector<TensorSpec>& tensors, const std::vector<RegionInfo>& regions,
                    const std::vector<bool>& usable, Where where,
                    std::vector<std::string>& problems) {
  const auto place_of = [where](const TensorSpec& tensor) {
    return where == Where::regions
               ? "offset " + number(tensor.offset_bytes) + " of region " + number(tensor.region)
               : "offset " + number(tensor.layer_offset_bytes) + " of layer buffer " +
                     number(tensor.layer_buffer);
  };
  const std::vector<Placed> placed = place_tensors(tensors, regions, &usable, where);
  for (std::size_t first = 0; first < placed.size();) {
    std::size_t last = first + 1;
    std::uint64_t reach = placed[first].end;
    while (last < placed.size() && placed[last].device == placed[first].device &&
           placed[last].inode == placed[first].inode && placed[last].begin < reach) {
      reach = std::max(reach, placed[last].end);
      ++last;
    }
    if (last - first > 1) {
      const ClusterSweep cluster(tensors, placed.data() + first, placed.data() + last);
      for (const OverlapPair& pair : cluster.run()) {
        const TensorSpec& a = tensors[std::min(pair.a, pair.b)];
        const TensorSpec& b = tensors[std::max(pair.a, pair.b)];
        problems.push_back(
            subject(a, pair.a) + " and tensor " + in_quotes(b.name) +
            (pair.certain ? ": they overlap" : ": their strides interleave, and they may overlap") +
            " (" + place_of(a) + " and " + place_of(b) + ")");
      }
    }
    first = last;
  }
}

void check_pools(const std::vector<RegionInfo>& regions, std::vector<std::string>& problems) {
  for (std::size_t i = 0; i < regions.size(); ++i) {
    for (std::size_t k = 0; regions[i].pool && k < regions.size(); ++k) {
      const bool same =
          regions[i].device == regions[k].device && regions[i].inode == regions[k].inode;
      // Of two pools the pair is named once.
      if (i == k || !same || (k < i && regions[k].pool)) continue;
      problems.push_back("manifest: region " + number(i) + ", a pool, and region " + number(k) +
                         " are the same memory");
    }
  }
}

}  // namespace

Result<std::shared_ptr<const Manifest>> Manifest::validate(
    const std::string& label, Role role, std::vector<TensorSpec> tensors,
    std::vector<RegionInfo> regions, std::vector<NameRule> name_map, const ManifestLimits& limits,
    std::vector<std::uint64_t> layer_buffers) {
  std::vector<std::string> problems;
  const auto refuse = [&]() {
    std::sort(problems.begin(), problems.end());
    const std::string count =
        problems.size() == 1 ? "1 problem" : number(problems.size()) + " problems";
    return fail(Errc::bad_manifest, "the manifest of " + label + " has " + count,
                std::move(problems));
  };
  const auto limit = [&](const char* what, std::size_t count, std::size_t count_max) {
    if (count <= count_max) return;
    problems.push_back("manifest: it has " + number(count) + " " + what + ", the limit is " +
                       number(count_max));
  };
  limit("tensors", tensors.size(), limits.tensors_max);
  limit("regions", regions.size(), limits.regions_max);
  limit("name rules", name_map.size(), limits.name_rules_max);
  limit("layer buffers", layer_buffers.size(), limits.layer_buffers_max);
  const bool pooled = std::any_of(regions.begin(), regions.end(),
                                  [](const RegionInfo& region) { return region.pool; });
  if (role != Role::engine && (pooled || !layer_buffers.empty())) {
    problems.emplace_back("manifest: only an engine has pools and layer buffers");
  }
  if (!problems.empty()) return refuse();

  std::shared_ptr<Manifest> manifest(new Manifest());
  manifest->label_ = label;
  manifest->tensors_ = std::move(tensors);
  manifest->regions_ = std::move(regions);
  manifest->name_map_ = std::move(name_map);
  manifest->layer_buffers_ = std::move(layer_buffers);
  std::vector<TensorSpec>& list = manifest->tensors_;

  std::vector<bool> usable(list.size(), false);
  TensorCheck check{manifest->regions_, manifest->layer_buffers_, limits, role, problems};
  MaybeBytes bytes = 0;
  std::uint64_t name_bytes = 0;
  std::vector<bool> legal(list.size(), true);
  for (std::size_t i = 0; i < list.size(); ++i) {
    if (const auto problem = name_problem(list[i].name, limits.name_bytes_max)) {
      problems.push_back(subject(list[i], i) + ": " + *problem);
      legal[i] = false;
    }
    name_bytes += list[i].name.size();
    const MaybeBytes tensor_bytes = check.check(list[i], i);
    usable[i] = tensor_bytes.has_value();
    if (bytes && tensor_bytes) bytes = checked_add(*bytes, *tensor_bytes);
  }
  if (bytes) {
    manifest->bytes_ = *bytes;
  } else {
    problems.emplace_back("manifest: the bytes of all tensors together overflow 64 bits");
  }

  std::vector<std::uint32_t>& by_name = manifest->by_name_;
  by_name.resize(list.size());
  std::iota(by_name.begin(), by_name.end(), 0U);
  std::sort(by_name.begin(), by_name.end(), [&](std::uint32_t a, std::uint32_t b) {
    const int order = list[a].name.compare(list[b].name);
    return order != 0 ? order < 0 : a < b;
  });
  for (std::size_t first = 0; first < by_name.size();) {
    std::size_t last = first + 1;
    const std::string& name = list[by_name[first]].name;
    while (last < by_name.size() && list[by_name[last]].name == name) ++last;
    if (last - first > 1 && !name.empty()) {
      problems.push_back("tensor " + in_quotes(name) + ": " + number(last - first) +
                         " tensors have this name (the first are numbers " +
                         number(by_name[first]) + " and " + number(by_name[first + 1]) + ")");
    }
    first = last;
  }

  if (!manifest->name_map_.empty()) {
    const NameMap map = NameMap::compile(manifest->name_map_, limits.pattern_bytes_max, problems);
    const MaybeBytes work = checked_multiply(map.work_per_byte(), name_bytes);
    if (!work || *work > kMatchWorkMax) {
      problems.push_back("manifest: its name rules (" + number(map.work_per_byte()) +
                         " instructions) are too costly for " + number(name_bytes) +
                         " bytes of names; the limit of the product is " + number(kMatchWorkMax));
    } else {
      manifest->destinations_.reserve(list.size());
      for (std::size_t i = 0; i < list.size(); ++i) {
        auto mapped = legal[i] ? map.apply(list[i].name, limits.name_bytes_max) : std::nullopt;
        if (!mapped) {
          manifest->destinations_.push_back({list[i].name, 0, 1});
          continue;
        }
        const NameRule& rule = manifest->name_map_[mapped->rule];
        if (const auto problem = name_problem(mapped->name, limits.name_bytes_max)) {
          const bool too_long = mapped->name.size() > limits.name_bytes_max;
          problems.push_back(
              subject(list[i], i) + ": name rule " + number(mapped->rule) + " " +
              in_quotes(rule.pattern) + " -> " + in_quotes(rule.target) +
              " rewrites it to an illegal name: " +
              (too_long ? "the name has more than " + number(limits.name_bytes_max) + " bytes"
                        : *problem));
          continue;
        }
        manifest->rewritten_.push_back(std::move(mapped->name));
        manifest->destinations_.push_back({manifest->rewritten_.back(), rule.part, rule.parts});
      }
    }
  }

  if (role == Role::engine) {
    check_overlaps(list, manifest->regions_, usable, Where::regions, problems);
    check_overlaps(list, manifest->regions_, usable, Where::layer_buffers, problems);
    check_pools(manifest->regions_, problems);
  }
  if (!problems.empty()) return refuse();
  return std::shared_ptr<const Manifest>(std::move(manifest));
}

std::vector<std::string> Manifest::shared_with(const Manifest& other) const {
  const bool common = std::any_of(regions_.begin(), regions_.end(), [&](const RegionInfo& mine) {
    return std::any_of(other.regions_.begin(), other.regions_.end(), [&](const RegionInfo& theirs) {
      return mine.device == theirs.device && mine.inode == theirs.inode;
    });
  });
  if (!common) return {};
  std::vector<std::string> shared;
  for (const RegionInfo& my_region : regions_) {
    for (const RegionInfo& their_region : other.regions_) {
      if (my_region.device != their_region.device || my_region.inode != their_region.inode ||
          !(my_region.pool || their_region.pool)) {
        continue;
      }
      shared.push_back("a pool of " + (my_region.pool ? label_ : other.label_) +
                       " is also memory of " + (my_region.pool ? other.label_ : label_));
    }
  }
  const std::vector<Placed> mine = place_tensors(tensors_, regions_, nullptr);
  const std::vector<Placed> theirs = place_tensors(other.tensors_, other.regions_, nullptr);
  const auto memory = [](const Placed& one) { return std::tie(one.device, one.inode); };
  // Neither list overlaps itself but for interleaved strides, so the two advance together.
  for (std::size_t a = 0, b = 0; a < mine.size() && b < theirs.size();) {
    const bool same_memory = memory(mine[a]) == memory(theirs[b]);
    if (same_memory && mine[a].begin < theirs[b].end && theirs[b].begin < mine[a].end) {
      shared.push_back("tensor " + in_quotes(tensors_[mine[a].tensor].name) + " of " + label_ +
                       " and tensor " + in_quotes(other.tensors_[theirs[b].tensor].name) + " of " +
                       other.label_ + ": they are the same memory");
    }
    const bool mine_ends_first =
        same_memory ? mine[a].end < theirs[b].end : memory(mine[a]) < memory(theirs[b]);
    ++(mine_ends_first ? a : b);
  }
  std::sort(shared.begin(), shared.end());
  return shared;
}

const TensorSpec* Manifest::find(std::string_view name) const noexcept {
  const auto it = std::lower_bound(
      by_name_.begin(), by_name_.end(), name,
      [this](std::uint32_t index, std::string_view key) { return tensors_[index].name < key; });
  if (it == by_name_.end() || tensors_[*it].name != name) return nullptr;
  return &tensors_[*it];
}

Manifest::Destination Manifest::destination(std::size_t tensor) const noexcept {
  if (destinations_.empty()) return {tensors_[tensor].name, 0, 1};
  return destinations_[tensor];
}

}  // namespace refit::daemon
