// Compiling a plan; see plan.hpp. Pure, any thread.
//
// The order of the passes: select targets, route sources to them, fit each target by itself (dtype,
// shape, fusion, disjoint boxes, coverage, copies), look for memory that is read and written at
// once, merge. A target with a problem yields no copies, and any problem yields no plan.
#include "plan/plan.hpp"

#include <algorithm>
#include <limits>
#include <map>
#include <tuple>
#include <utility>

#include "plan/arithmetic.hpp"
#include "plan/text.hpp"

namespace refit::daemon {
namespace {

// Pairs of boxes that one compilation compares. A grid of 256 x 256 shards for one target needs
// 2^24; beyond 2^26 (a fraction of a second) it is no layout, it is an attack.
constexpr std::uint64_t kComparisonsMax = std::uint64_t{1} << 26;

// Sources listed in one line; a fused and sharded target may have thousands.
constexpr std::size_t kListedMax = 8;

/// A box of a target, in the target's global shape.
struct Box {
  std::array<std::uint64_t, Manifest::kDimsMax> begin{};
  std::array<std::uint64_t, Manifest::kDimsMax> end{};
};

std::string box_repr(const Box& box, std::size_t dims) {
  std::string text = "[";
  for (std::size_t d = 0; d < dims; ++d) {
    if (d > 0) text += ", ";
    text += number(box.begin[d]) + ":" + number(box.end[d]);
  }
  return text + "]";
}

bool meet(const Box& a, const Box& b, std::size_t dims) noexcept {
  for (std::size_t d = 0; d < dims; ++d) {
    if (a.begin[d] >= b.end[d] || b.begin[d] >= a.end[d]) return false;
  }
  return true;
}

/// A source tensor on its way to a target.
struct Route {
  std::uint32_t target = 0;
  std::uint32_t part = 0;
  std::uint32_t parts = 1;
  std::uint32_t source = 0;
};

/// What one source brings to a target: a box that is not empty.
struct Piece {
  std::uint32_t source = 0;
  std::uint64_t first_row = 0;  ///< where the source's part begins in dimension 0 of the target
  Box box;
};

/// Bytes that the plan reads or writes in memory that both manifests have.
struct Touched {
  std::uint32_t memory = 0;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;
  bool written = false;
  std::uint32_t tensor = 0;
};

class Compiler {
 public:
  Compiler(const Manifest& source, const Manifest& target, const PlanOptions& options)
      : source_(source), target_(target), options_(options) {}

  Result<Plan> run() {
    find_shared_memory();
    select();
    route();
    std::size_t next = 0;
    for (const std::uint32_t target : plan_.targets) {
      const std::size_t first = next;
      while (next < routes_.size() && routes_[next].target == target) ++next;
      fit(target, routes_.data() + first, routes_.data() + next);
    }
    check_touched();
    if (!problems_.empty()) {
      std::sort(problems_.begin(), problems_.end());
      problems_.erase(std::unique(problems_.begin(), problems_.end()), problems_.end());
      const std::string count =
          problems_.size() == 1 ? "1 problem" : number(problems_.size()) + " problems";
      return fail(Errc::manifest_mismatch,
                  source_.label() + " does not fit " + target_.label() + ": " + count,
                  std::move(problems_));
    }
    merge(plan_.copies);
    merge(plan_.layer_copies);
    plan_.whole = plan_.targets.size() == target_.tensors().size();
    return std::move(plan_);
  }

 private:
  using Routes = const Route*;

  static constexpr std::uint32_t kPrivate = std::numeric_limits<std::uint32_t>::max();

  const TensorSpec& from(const Route& route) const { return source_.tensors()[route.source]; }

  void report(const TensorSpec& target, const std::string& what) {
    problems_.push_back("target " + describe(target, target_.label()) + ": " + what);
  }

  // Numbers the memories that both sides have; in practice none, then nothing is recorded at all.
  void find_shared_memory() {
    std::map<std::pair<std::uint64_t, std::uint64_t>, std::uint32_t> shared;
    for (const RegionInfo& region : source_.regions()) {
      shared.emplace(std::pair(region.device, region.inode), kPrivate);
    }
    std::uint32_t count = 0;
    for (const RegionInfo& region : target_.regions()) {
      const auto it = shared.find({region.device, region.inode});
      if (it != shared.end() && region.pool) {
        problems_.push_back("memory: a pool of " + target_.label() + " is also memory of " +
                            source_.label());
      }
      if (it != shared.end() && it->second == kPrivate) it->second = count++;
      target_memory_.push_back(it == shared.end() ? kPrivate : it->second);
    }
    for (const RegionInfo& region : source_.regions()) {
      source_memory_.push_back(shared.at({region.device, region.inode}));
    }
  }

  void select() {
    const std::vector<TensorSpec>& targets = target_.tensors();
    selected_.assign(targets.size(), options_.selection.empty());
    std::vector<std::string_view> unknown;
    for (const std::string& name : options_.selection) {
      if (const TensorSpec* tensor = target_.find(name)) {
        selected_[static_cast<std::size_t>(tensor - targets.data())] = true;
      } else {
        unknown.emplace_back(name);
      }
    }
    std::sort(unknown.begin(), unknown.end());
    unknown.erase(std::unique(unknown.begin(), unknown.end()), unknown.end());
    for (const std::string_view name : unknown) {
      problems_.push_back("selected " + in_quotes(name) + ": " + target_.label() +
                          " has no such tensor (the source is " + source_.label() + ")");
    }
    for (std::size_t i = 0; i < targets.size(); ++i) {
      if (selected_[i]) plan_.targets.push_back(static_cast<std::uint32_t>(i));
    }
  }

  void route() {
    const std::vector<TensorSpec>& sources = source_.tensors();
    const bool unmatched_is_wrong = options_.selection.empty() && !options_.allow_unmatched;
    for (std::size_t i = 0; i < sources.size(); ++i) {
      const Manifest::Destination destination = source_.destination(i);
      const TensorSpec* tensor = target_.find(destination.name);
      if (tensor == nullptr) {
        if (!unmatched_is_wrong) continue;
        problems_.push_back("source " + describe(sources[i], source_.label()) + ": " +
                            target_.label() + " has no tensor " + in_quotes(destination.name));
        continue;
      }
      const auto target = static_cast<std::size_t>(tensor - target_.tensors().data());
      if (!selected_[target]) continue;
      routes_.push_back({static_cast<std::uint32_t>(target), destination.part, destination.parts,
                         static_cast<std::uint32_t>(i)});
    }
    std::sort(routes_.begin(), routes_.end(), [](const Route& a, const Route& b) {
      return std::tie(a.target, a.part, a.source) < std::tie(b.target, b.part, b.source);
    });
  }

  std::string list(Routes first, Routes last) const {
    std::string text;
    std::size_t listed = 0;
    for (Routes route = first; route != last; ++route, ++listed) {
      if (listed == kListedMax) {
        return text + " and " + number(static_cast<std::uint64_t>(last - route)) + " more";
      }
      if (listed > 0) text += "; ";
      if (route->parts != 1) {
        text += "part " + number(route->part) + " of " + number(route->parts) + " ";
      }
      text += describe(from(*route), source_.label());
    }
    return text;
  }

  void fit(std::uint32_t target, Routes first, Routes last) {
    const TensorSpec& to = target_.tensors()[target];
    if (first == last) {
      report(to, "no tensor of " + source_.label() + " maps to it");
      return;
    }
    bool fits = true;
    for (Routes route = first; route != last; ++route) {
      const TensorSpec& tensor = from(*route);
      if (cast_between(tensor.dtype, to.dtype)) continue;
      report(to, "source " + describe(tensor, source_.label()) +
                     " has another dtype, and no cast leads from " +
                     std::string(dtype_name(tensor.dtype)) + " to " +
                     std::string(dtype_name(to.dtype)));
      fits = false;
    }
    pieces_.clear();
    const bool fused =
        std::any_of(first, last, [](const Route& route) { return route.parts != 1; });
    if (!(fused ? place_parts(to, first, last) : place_wholes(to, first, last))) fits = false;
    if (!fits) return;

    const std::size_t dims = to.shape.size();
    if (!check_disjoint(to, dims)) return;
    const std::uint64_t elements = *element_count(to.shape);
    std::uint64_t covered = 0;
    for (const Piece& piece : pieces_) {
      std::uint64_t volume = 1;
      for (std::size_t d = 0; d < dims; ++d) volume *= piece.box.end[d] - piece.box.begin[d];
      covered += volume;  // Disjoint boxes of the target: never more than its elements.
    }
    if (covered != elements) {
      report(to, number(elements - covered) + " of its " + number(elements) +
                     " elements have no source; it gets " + list(first, last));
      return;
    }
    plan_.bytes += elements * element_bytes(to.dtype);
    if (to.layer_buffer != kNoLayerBuffer) plan_.layer_bytes += elements * element_bytes(to.dtype);
    for (const Piece& piece : pieces_) emit(target, piece);
  }

  bool place_wholes(const TensorSpec& to, Routes first, Routes last) {
    bool fits = true;
    for (Routes route = first; route != last; ++route) {
      if (from(*route).global_shape == to.global_shape) {
        add_piece(to, *route, 0);
        continue;
      }
      report(to, "source " + describe(from(*route), source_.label()) + " has another shape");
      fits = false;
    }
    return fits;
  }

  bool place_parts(const TensorSpec& to, Routes first, Routes last) {
    const std::uint32_t parts = first->parts;
    for (Routes route = first; route != last; ++route) {
      if (route->parts == parts) continue;
      report(to, "its sources disagree on how many parts it is fused from: " + list(first, last));
      return false;
    }
    bool fits = true;
    std::string missing;
    std::uint64_t missing_count = 0;
    std::uint32_t expected = 0;
    // Parts are counted as gaps, never one by one: the client chose how many there are.
    const auto skip_to = [&](std::uint32_t part) {
      for (std::uint32_t k = expected; k < part && missing_count + (k - expected) < kListedMax;
           ++k) {
        missing += (missing.empty() ? "" : ", ") + number(k);
      }
      missing_count += part - expected;
    };
    for (Routes route = first; route != last; ++route) {
      if (route->part < expected) continue;
      skip_to(route->part);
      expected = route->part + 1;
    }
    skip_to(parts);
    if (missing_count > 0) {
      if (missing_count > kListedMax) missing += ", ...";
      report(to, number(missing_count) + " of the " + number(parts) +
                     " parts that it is fused from are missing (part " + missing + "); there are " +
                     list(first, last));
      fits = false;
    }
    const Dims& global = to.global_shape;
    if (global.empty()) {
      report(to, "it has no dimension 0 to be fused along: " + list(first, last));
      return false;
    }
    MaybeBytes rows = 0;
    Routes part = first;  // The first route of the current part; it speaks for its siblings.
    for (Routes route = first; route != last; ++route) {
      const Dims& shape = from(*route).global_shape;
      if (shape.size() != global.size() ||
          !std::equal(shape.begin() + 1, shape.end(), global.begin() + 1)) {
        report(to, "source " + describe(from(*route), source_.label()) + ", part " +
                       number(route->part) + " of " + number(parts) +
                       ", has another shape beyond dimension 0");
        fits = false;
        continue;
      }
      if (route == first || route->part != part->part) {
        part = route;
        if (rows) rows = checked_add(*rows, shape[0]);
      } else if (shape != from(*part).global_shape) {
        report(to, "the sources of part " + number(route->part) + " of " + number(parts) +
                       " are not boxes of one shape: " + describe(from(*part), source_.label()) +
                       " and " + describe(from(*route), source_.label()));
        fits = false;
      }
    }
    if (!fits) return false;
    if (!rows || *rows != global[0]) {
      report(to, "its parts have " + (rows ? number(*rows) : std::string("more than 2^64")) +
                     " rows together, it has " + number(global[0]) + ": " + list(first, last));
      return false;
    }
    std::uint64_t first_row = 0;
    for (Routes route = first; route != last; ++route) {
      if (route != first && route->part != route[-1].part) {
        first_row += from(route[-1]).global_shape[0];
      }
      add_piece(to, *route, first_row);
    }
    return true;
  }

  void add_piece(const TensorSpec& to, const Route& route, std::uint64_t first_row) {
    const TensorSpec& tensor = from(route);
    Piece piece{route.source, first_row, {}};
    if (to.shape.empty()) piece.box.end[0] = 1;  // One element, which two sources cannot share.
    for (std::size_t d = 0; d < to.shape.size(); ++d) {
      // Fits: a box ends inside its global shape, and all parts together inside the target's.
      const std::uint64_t begin = tensor.box_offset[d] + (d == 0 ? first_row : 0);
      piece.box.begin[d] = std::max(begin, to.box_offset[d]);
      piece.box.end[d] = std::min(begin + tensor.shape[d], to.box_offset[d] + to.shape[d]);
      if (piece.box.begin[d] >= piece.box.end[d]) return;
    }
    pieces_.push_back(piece);
  }

  // A sweep along the dimension that separates best: for any grid of shards the boxes that are open
  // at one time are those of one slice.
  bool check_disjoint(const TensorSpec& to, std::size_t dims) {
    if (pieces_.size() < 2) return true;
    std::size_t best = 0;
    std::size_t best_count = 0;
    std::vector<std::uint64_t> begins(pieces_.size());
    for (std::size_t d = 0; d < dims; ++d) {
      std::transform(pieces_.begin(), pieces_.end(), begins.begin(),
                     [d](const Piece& piece) { return piece.box.begin[d]; });
      std::sort(begins.begin(), begins.end());
      const auto count =
          static_cast<std::size_t>(std::unique(begins.begin(), begins.end()) - begins.begin());
      if (count > best_count) {
        best = d;
        best_count = count;
      }
    }
    std::vector<std::uint32_t> order(pieces_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = static_cast<std::uint32_t>(i);
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      return std::tie(pieces_[a].box.begin[best], a) < std::tie(pieces_[b].box.begin[best], b);
    });
    bool disjoint = true;
    std::vector<std::uint32_t> open;
    for (const std::uint32_t index : order) {
      const Piece& piece = pieces_[index];
      bool alone = true;
      for (std::size_t i = 0; i < open.size();) {
        if (comparisons_left_ == 0) {
          report(to, "its " + number(pieces_.size()) + " sources from " + source_.label() +
                         " are cut too oddly to prove that they do not meet");
          return false;
        }
        --comparisons_left_;
        const Piece& other = pieces_[open[i]];
        if (other.box.end[best] <= piece.box.begin[best]) {
          open[i] = open.back();
          open.pop_back();
          continue;
        }
        if (meet(piece.box, other.box, dims)) {
          const auto [a, b] = std::minmax(piece.source, other.source);
          report(to, "sources " + describe(source_.tensors()[a], source_.label()) + " and " +
                         describe(source_.tensors()[b], source_.label()) +
                         " both write its elements " + common(piece.box, other.box, dims));
          // Its stand-in is there already: a thousand replicas are a thousand lines, not a million.
          alone = false;
          break;
        }
        ++i;
      }
      if (alone) {
        open.push_back(index);
      } else {
        disjoint = false;
      }
    }
    return disjoint;
  }

  static std::string common(const Box& a, const Box& b, std::size_t dims) {
    Box box;
    for (std::size_t d = 0; d < dims; ++d) {
      box.begin[d] = std::max(a.begin[d], b.begin[d]);
      box.end[d] = std::min(a.end[d], b.end[d]);
    }
    return box_repr(box, dims);
  }

  void emit(std::uint32_t target, const Piece& piece) {
    const TensorSpec& to = target_.tensors()[target];
    const TensorSpec& tensor = source_.tensors()[piece.source];
    const std::uint64_t element = element_bytes(to.dtype);
    const std::uint64_t source_element = element_bytes(tensor.dtype);
    Copy copy;
    copy.cast = *cast_between(tensor.dtype, to.dtype);
    copy.source_region = tensor.region;
    copy.target_region = to.region;
    copy.source_offset = tensor.offset_bytes;
    copy.target_offset = to.offset_bytes;
    std::array<Copy::Loop, Copy::kDimsMax> loops{};
    std::size_t count = 0;
    for (std::size_t d = 0; d < to.shape.size(); ++d) {
      // All that follows stays inside the two tensors' spans, which fit; a dimension of extent 1 is
      // left out because its stride says nothing.
      const std::uint64_t source_begin = tensor.box_offset[d] + (d == 0 ? piece.first_row : 0);
      const std::uint64_t source_skip = piece.box.begin[d] - source_begin;
      const std::uint64_t target_skip = piece.box.begin[d] - to.box_offset[d];
      if (source_skip > 0) copy.source_offset += source_skip * tensor.strides[d] * source_element;
      if (target_skip > 0) copy.target_offset += target_skip * to.strides[d] * element;
      const std::uint64_t extent = piece.box.end[d] - piece.box.begin[d];
      if (extent > 1) {
        loops[count++] = {extent, tensor.strides[d] * source_element, to.strides[d] * element};
      }
    }
    // Walking the target in address order makes runs out of any permutation that both sides share.
    sort_few(loops.data(), count, [](const Copy::Loop& a, const Copy::Loop& b) {
      return a.target_stride_bytes > b.target_stride_bytes;
    });
    copy.run_bytes = element;
    for (std::size_t i = count; i-- > 0;) {
      const Copy::Loop& loop = loops[i];
      if (copy.loop_count == 0 && loop.source_stride_bytes == copy.source_run_bytes() &&
          loop.target_stride_bytes == copy.run_bytes) {
        copy.run_bytes *= loop.count;
        continue;
      }
      // copy.loops is innermost first until the end.
      if (copy.loop_count > 0) {
        Copy::Loop& inner = copy.loops[copy.loop_count - 1];
        const MaybeBytes source_step = checked_multiply(inner.count, inner.source_stride_bytes);
        const MaybeBytes target_step = checked_multiply(inner.count, inner.target_stride_bytes);
        if (source_step == loop.source_stride_bytes && target_step == loop.target_stride_bytes) {
          inner.count *= loop.count;
          continue;
        }
      }
      copy.loops[copy.loop_count++] = loop;
    }
    std::reverse(copy.loops.begin(), copy.loops.begin() + copy.loop_count);
    touch(target, piece.source, copy);
    if (copy.cast != Cast::none) plan_.casts.push_back({piece.source, target});
    plan_.copies.push_back(copy);
    if (to.layer_buffer == kNoLayerBuffer) return;
    copy.target_offset += to.layer_offset_bytes - to.offset_bytes;
    copy.target_region = to.layer_buffer;
    plan_.layer_copies.push_back(copy);
  }

  void touch(std::uint32_t target, std::uint32_t source, const Copy& copy) {
    std::uint64_t read = copy.source_run_bytes();
    std::uint64_t written = copy.run_bytes;
    for (std::uint32_t i = 0; i < copy.loop_count; ++i) {
      read += (copy.loops[i].count - 1) * copy.loops[i].source_stride_bytes;
      written += (copy.loops[i].count - 1) * copy.loops[i].target_stride_bytes;
    }
    const auto record = [this](std::uint32_t memory, std::uint64_t begin, std::uint64_t bytes,
                               bool is_written, std::uint32_t tensor) {
      if (memory == kPrivate) return;
      touched_.push_back({memory, begin, begin + bytes, is_written, tensor});
    };
    record(source_memory_[copy.source_region], copy.source_offset, read, false, source);
    record(target_memory_[copy.target_region], copy.target_offset, written, true, target);
  }

  void check_touched() {
    std::sort(touched_.begin(), touched_.end(), [](const Touched& a, const Touched& b) {
      return std::tie(a.memory, a.begin, a.end, a.written, a.tensor) <
             std::tie(b.memory, b.begin, b.end, b.written, b.tensor);
    });
    const Touched* read = nullptr;     // The one that reaches furthest so far.
    const Touched* written = nullptr;  // Its counterpart.
    for (const Touched& now : touched_) {
      if (read != nullptr && read->memory != now.memory) read = nullptr;
      if (written != nullptr && written->memory != now.memory) written = nullptr;
      const Touched* other = now.written ? read : written;
      if (other != nullptr && other->end > now.begin) {
        const Touched& in = now.written ? *other : now;
        const Touched& out = now.written ? now : *other;
        report(target_.tensors()[out.tensor],
               "source " + describe(source_.tensors()[in.tensor], source_.label()) +
                   " is the same memory");
      }
      const Touched*& furthest = now.written ? written : read;
      if (furthest == nullptr || now.end > furthest->end) furthest = &now;
    }
  }

  static void merge(std::vector<Copy>& copies) {
    const auto before = [](const Copy& a, const Copy& b) {
      return std::tie(a.target_region, a.target_offset) <
             std::tie(b.target_region, b.target_offset);
    };
    if (!std::is_sorted(copies.begin(), copies.end(), before)) {
      std::sort(copies.begin(), copies.end(), before);
    }
    std::size_t kept = 0;
    for (const Copy& copy : copies) {
      if (kept > 0) {
        Copy& last = copies[kept - 1];
        if (last.loop_count == 0 && copy.loop_count == 0 && last.cast == copy.cast &&
            last.source_region == copy.source_region && last.target_region == copy.target_region &&
            last.source_offset + last.source_run_bytes() == copy.source_offset &&
            last.target_offset + last.run_bytes == copy.target_offset) {
          last.run_bytes += copy.run_bytes;
          continue;
        }
      }
      copies[kept++] = copy;
    }
    copies.resize(kept);
  }

  const Manifest& source_;
  const Manifest& target_;
  const PlanOptions& options_;
  Plan plan_;
  std::vector<std::string> problems_;
  std::vector<bool> selected_;                ///< by target
  std::vector<Route> routes_;                 ///< sorted by target, part, source
  std::vector<Piece> pieces_;                 ///< of the target at hand
  std::vector<std::uint32_t> source_memory_;  ///< by source region, kPrivate where not shared
  std::vector<std::uint32_t> target_memory_;  ///< by target region
  std::vector<Touched> touched_;
  std::uint64_t comparisons_left_ = kComparisonsMax;
};

}  // namespace

Result<Plan> Plan::compile(const Manifest& source, const Manifest& target,
                           const PlanOptions& options) {
  return Compiler(source, target, options).run();
}

}  // namespace refit::daemon
