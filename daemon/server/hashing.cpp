#include "server/hashing.hpp"

#include <algorithm>
#include <map>
#include <numeric>
#include <utility>

#include "server/layer_reading.hpp"

namespace refit::daemon {
namespace {

/// Small tensors share a part, so that handing parts out costs nothing beside hashing.
constexpr std::uint64_t kPartBytes = std::uint64_t{2} << 20;

/// What beginning and ending a stream costs, in bytes that could be hashed instead.
constexpr std::uint64_t kStreamBytes = 1024;

std::uint64_t bytes_of(const TensorSpec& spec) {
  std::uint64_t bytes = element_bytes(spec.dtype);
  for (const std::uint64_t extent : spec.shape) bytes *= extent;
  return bytes;
}

/// Its elements stand in row-major order without gaps.
bool is_contiguous(const TensorSpec& spec) {
  std::uint64_t expected = 1;
  for (std::size_t i = spec.shape.size(); i-- > 0;) {
    if (spec.shape[i] != 1 && spec.strides[i] != expected) return false;
    expected *= spec.shape[i];
  }
  return true;
}

}  // namespace

std::vector<std::vector<std::uint32_t>> share_out(const std::vector<std::uint64_t>& bytes,
                                                  unsigned threads) {
  const std::uint64_t share = std::reduce(bytes.begin(), bytes.end()) / std::max(1U, threads);
  std::multimap<std::uint64_t, std::uint32_t> left;
  for (std::uint32_t i = 0; i < bytes.size(); ++i) left.emplace(bytes[i], i);
  std::vector<std::vector<std::uint32_t>> parts;
  const auto move_to_part = [&](auto stream) {
    parts.back().push_back(stream->second);
    left.erase(stream);
  };
  while (!left.empty()) {
    const auto largest = std::prev(left.end());
    const std::uint64_t largest_bytes = largest->first;
    parts.emplace_back();
    move_to_part(largest);
    std::uint64_t room = largest_bytes >= share ? 0 : std::max(largest_bytes, kPartBytes);
    while (room > 0) {
      const auto above = left.upper_bound(room);
      if (above == left.begin()) break;
      const auto fitting = std::prev(above);
      room -= fitting->first;
      move_to_part(fitting);
    }
  }
  return parts;
}

/// One of the two streams that a thread hashes at a time.
struct HashJob::Lane {
  explicit Lane(DigestKind kind) : hasher(kind) {}

  Hasher hasher;
  std::optional<std::uint32_t> stream;  ///< of hashing_.tensors, or behind them: the module's
  std::size_t tensor = 0;               ///< of the module's stream
  std::optional<LayerReading> layer;    ///< where the tensor lies, if that is a device place

  // Where the tensor's bytes come from.
  ElementReader elements;
  std::unique_ptr<DeviceReading> reading;  ///< of dense elements on a device
  std::vector<std::byte> gathered;         ///< from a device: all that its elements lie among

  std::span<const std::byte> piece;  ///< not hashed yet; empty: there is nothing left to do
};

std::unique_ptr<HashJob> HashJob::make(Hashing& hashing, DeviceAccess& devices, unsigned threads,
                                       Done done) {
  hashing.digests.assign(hashing.tensors.size(), {});
  std::vector<std::uint64_t> bytes;
  for (const TensorSpec* spec : hashing.tensors) bytes.push_back(bytes_of(*spec) + kStreamBytes);
  if (hashing.per_module) {
    const auto end = bytes.begin() + static_cast<std::ptrdiff_t>(hashing.host_count);
    bytes.push_back(std::reduce(bytes.begin(), end));
  }
  return std::unique_ptr<HashJob>(
      new HashJob(hashing, devices, share_out(bytes, threads), std::move(done)));
}

HashJob::HashJob(Hashing& hashing, DeviceAccess& devices, Parts parts, Done done)
    : BackgroundJob(parts.size()),
      hashing_(hashing),
      devices_(devices),
      parts_(std::move(parts)),
      done_(std::move(done)) {
  for (const MappedRegion& region : hashing_.registration->regions) {
    if (region.kind == RegionKind::host)
      ranges_.push_back({region.host.data(), region.host.bytes()});
  }
  if (!hashing_.per_module) return;
  const auto begin = hashing_.tensors.begin();
  by_name_.assign(begin, begin + static_cast<std::ptrdiff_t>(hashing_.host_count));
  std::sort(by_name_.begin(), by_name_.end(),
            [](const TensorSpec* a, const TensorSpec* b) { return comes_first(*a, *b); });
}

void HashJob::run_part(std::size_t part) {
  std::array<Lane, 2> lanes{Lane(hashing_.kind), Lane(hashing_.kind)};
  Lane& a = lanes[0];
  Lane& b = lanes[1];
  auto waiting = parts_[part].begin();
  for (;;) {
    for (Lane& lane : lanes) {
      while (lane.piece.empty() && (lane.stream || waiting != parts_[part].end())) {
        if (hashing_.cancelled.load()) return;
        if (!(lane.stream ? fill(lane) : begin(lane, *waiting++))) return;
      }
    }
    if (a.piece.empty() && b.piece.empty()) return;
    if (!guarded([&] { Hasher::update_two(a.hasher, a.piece, b.hasher, b.piece); })) return;
  }
}

/// The next bytes of the lane's stream, or its end.
bool HashJob::fill(Lane& lane) {
  if (lane.reading != nullptr) {
    const auto chunk = lane.reading->next();
    if (!chunk) return fail(chunk.error());
    lane.piece = *chunk;
    if (lane.piece.empty()) lane.reading.reset();
  } else if (!guarded([&lane] { lane.piece = lane.elements.next(); })) {
    return false;
  }
  return !lane.piece.empty() || end_tensor(lane);
}

bool HashJob::begin(Lane& lane, std::uint32_t stream) {
  lane.stream = stream;
  lane.tensor = 0;
  lane.layer.reset();
  if (!is_module(stream) && stream >= hashing_.host_count) {
    lane.layer.emplace(*hashing_.registration, hashing_.session->request_region(),
                       hashing_.tensors[stream]->layer_buffer);
    return begin_layer(lane);
  }
  return begin_tensor(lane);
}

/// Of a module's stream the next tensor, of others the only one.
bool HashJob::begin_tensor(Lane& lane) {
  const std::uint32_t stream = *lane.stream;
  if (is_module(stream) && lane.tensor == by_name_.size()) {
    hashing_.module_digest = lane.hasher.finish();
    lane.stream.reset();
    return true;
  }
  const TensorSpec& spec = is_module(stream) ? *by_name_[lane.tensor] : *hashing_.tensors[stream];
  if (is_module(stream)) {
    lane.hasher.update(spec.name);
  } else {
    update_with_prefix(lane.hasher, hashing_.kind, spec);
  }
  return open(lane, spec, hashing_.registration->regions[spec.region], spec.offset_bytes);
}

bool HashJob::end_tensor(Lane& lane) {
  const std::uint32_t stream = *lane.stream;
  if (is_module(stream)) {
    ++lane.tensor;
    return begin_tensor(lane);
  }
  const Digest digest = lane.hasher.finish();
  if (lane.layer && !lane.layer->held_still()) return begin_layer(lane);
  hashing_.digests[stream] = digest;
  lane.stream.reset();
  return true;
}

bool HashJob::begin_layer(Lane& lane) {
  const Registration& registration = *hashing_.registration;
  const TensorSpec& spec = *hashing_.tensors[*lane.stream];
  const auto place = lane.layer->look();
  if (!place) return fail(place.error());
  if (!place->resident) {
    lane.stream.reset();
    return true;
  }
  update_with_prefix(lane.hasher, hashing_.kind, spec);
  return open(lane, spec, registration.regions[place->region],
              place->offset + spec.layer_offset_bytes);
}

/// Makes the tensor's bytes come from wherever they are: `offset` of `region`.
bool HashJob::open(Lane& lane, const TensorSpec& spec, const MappedRegion& region,
                   std::uint64_t offset) {
  if (region.kind == RegionKind::host) {
    lane.elements.begin({&spec, region.data() + offset});
    return true;
  }
  if (bytes_of(spec) == 0) return true;
  const auto devices = devices_.required(hashing_.registration->manifest->label());
  if (!devices) return fail(devices.error());
  const std::uint64_t span = span_bytes(spec);
  auto reading = (*devices)->read(*region.device, offset, span);
  if (!reading) return fail(reading.error());
  if (!is_contiguous(spec)) return gather(lane, spec, **reading, span);
  lane.reading = std::move(*reading);
  return true;
}

bool HashJob::gather(Lane& lane, const TensorSpec& spec, DeviceReading& reading,
                     std::uint64_t span) {
  lane.gathered.clear();
  lane.gathered.reserve(span);
  while (lane.gathered.size() < span) {
    const auto chunk = reading.next();
    if (!chunk) return fail(chunk.error());
    lane.gathered.insert(lane.gathered.end(), chunk->begin(), chunk->end());
  }
  lane.elements.begin({&spec, lane.gathered.data()});
  return true;
}

template <typename Body>
bool HashJob::guarded(Body&& body) {
  if (run_guarded(ranges_.data(), ranges_.size(), body)) return true;
  return fail({Errc::memory_fault,
               0,
               hashing_.registration->manifest->label() +
                   ": the engine's memory faulted (SIGBUS) while it was hashed",
               {}});
}

bool HashJob::fail(Error error) {
  const std::lock_guard lock(mutex_);
  if (!error_) error_ = std::move(error);
  return false;
}

}  // namespace refit::daemon
