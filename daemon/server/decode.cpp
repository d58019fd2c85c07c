#include "server/decode.hpp"

#include <algorithm>
#include <cstring>

#include "ipc/shared_layout.hpp"
#include "plan/text.hpp"

namespace refit::daemon {
namespace {

/// Segments of all VMM ranges of one module; allocators make them 20 MiB and larger.
constexpr std::size_t kDevicePiecesMax = 16'384;

template <typename Vector>
std::size_t count(const Vector* vector) {
  return vector == nullptr ? 0 : vector->size();
}

Result<void> bounded(std::size_t value, std::size_t limit, const std::string& module,
                     const char* what) {
  if (value <= limit) return {};
  return fail(Errc::quota, module + ": " + std::to_string(value) + " " + what + "; the limit is " +
                               std::to_string(limit));
}

/// FlatBuffers shares: thousands of fields may name one long string or vector of a short message.
/// All that is copied together may therefore have no more bytes than a message. One that shares
/// nothing always fits, and what is too long in it is left for Manifest to list.
class BoundedCopy {
 public:
  Dims dims(const flatbuffers::Vector<std::uint64_t>* values) {
    if (values == nullptr || !spend(values->size() * sizeof(std::uint64_t))) return {};
    return Dims(values->begin(), values->end());
  }

  std::string text(const flatbuffers::String* value) {
    if (value == nullptr || !spend(value->size())) return {};
    return std::string(view(value));
  }

  [[nodiscard]] bool overspent() const noexcept { return overspent_; }

 private:
  bool spend(std::size_t bytes) {
    overspent_ = overspent_ || bytes > left_bytes_;
    if (overspent_) return false;
    left_bytes_ -= bytes;
    return true;
  }
  std::size_t left_bytes_ = kPayloadBytesMax;
  bool overspent_ = false;
};

/// False, and nothing copied, if it does not have as many bytes.
template <std::size_t kBytes>
bool copy_exactly(const flatbuffers::Vector<std::uint8_t>* from,
                  std::array<std::uint8_t, kBytes>& to) {
  if (count(from) != kBytes) return false;
  std::copy(from->begin(), from->end(), to.begin());
  return true;
}

Result<RegionClaim> decode_region(const wire::Region& region, const std::string& label) {
  RegionClaim claim;
  claim.ticket = region.ticket();
  claim.bytes = region.bytes();
  claim.pool = region.pool();
  const auto kind = static_cast<RegionKind>(region.kind());
  if (kind == RegionKind::host) return claim;
  if (kind > RegionKind::cuda_local)
    return fail(Errc::bad_argument, label + " is of a kind that does not exist");
  Exported device;
  device.kind = kind;
  device.bytes = region.bytes();
  if (!copy_exactly(region.device(), device.device.bytes))
    return fail(Errc::bad_argument, label + ": a device is named by a UUID of 16 bytes");
  if (count(region.pieces()) == 0)
    return fail(Errc::bad_region, label + ": device memory without a piece");
  std::uint64_t bytes = 0;
  for (const auto* piece : *region.pieces()) {
    DevicePiece one;
    one.bytes = piece->bytes();
    if (one.bytes == 0 || one.bytes > claim.bytes - bytes) {
      return fail(Errc::bad_region, label + ": its pieces are not together as long as it is (" +
                                        std::to_string(claim.bytes) + " bytes)");
    }
    bytes += one.bytes;
    std::array<std::uint8_t, sizeof device.address> address{};
    bool good = true;
    switch (kind) {
      case RegionKind::cuda_legacy:
        good = copy_exactly(piece->handle(), one.handle) && region.pieces()->size() == 1;
        break;
      case RegionKind::cuda_local:
        good = copy_exactly(piece->handle(), address) && region.pieces()->size() == 1;
        std::memcpy(&device.address, address.data(), sizeof device.address);
        break;
      case RegionKind::cuda_vmm:
      case RegionKind::host:
        claim.piece_tickets.push_back(piece->ticket());
        break;
    }
    if (!good) {
      return fail(
          Errc::bad_region,
          label + ": a legacy CUDA IPC handle is one piece of 64 bytes, an address one of 8");
    }
    device.pieces.push_back(std::move(one));
  }
  if (bytes != claim.bytes) {
    return fail(Errc::bad_region, label + ": its pieces have " + std::to_string(bytes) +
                                      " bytes together, and it has " + std::to_string(claim.bytes));
  }
  device.pieces.front().allocation_id = region.allocation();
  claim.device = std::move(device);
  return claim;
}

}  // namespace

Clock::time_point deadline_after(Clock::time_point arrived, std::uint64_t deadline_us) {
  constexpr std::uint64_t kDeadlineUsMax = 3'600'000'000;
  return arrived + std::chrono::microseconds(std::min(deadline_us, kDeadlineUsMax));
}

Result<std::vector<std::string>> decode_tensor_names(const Names* names, const char* what) {
  const ManifestLimits limits;
  std::vector<std::string> copied;
  if (names == nullptr) return copied;
  if (names->size() > limits.tensors_max) {
    return fail(Errc::quota, std::string(what) + " has " + std::to_string(names->size()) +
                                 " names; the limit is " + std::to_string(limits.tensors_max));
  }
  copied.reserve(names->size());
  for (const auto* name : *names) {
    if (name->size() > limits.name_bytes_max) {
      return fail(Errc::quota, std::string(what) + " has a name of " +
                                   std::to_string(name->size()) + " bytes; the limit is " +
                                   std::to_string(limits.name_bytes_max));
    }
    copied.emplace_back(view(name));
  }
  std::vector<std::string_view> sorted(copied.begin(), copied.end());
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  if (twice != sorted.end()) {
    return fail(Errc::bad_argument,
                std::string(what) + " names tensor " + std::string(*twice) + " twice");
  }
  return copied;
}

Result<std::vector<std::pair<std::string, Digest>>> decode_expected(
    const flatbuffers::Vector<flatbuffers::Offset<wire::ExpectedDigest>>* list, std::uint8_t kind,
    const char* what) {
  const ManifestLimits limits;
  std::vector<std::pair<std::string, Digest>> expected;
  if (kind >= static_cast<std::uint8_t>(DigestKind::xxh3)) {
    return fail(Errc::bad_argument,
                std::string(what) + " needs SHA-256 (sglang or raw); XXH3 proves nothing");
  }
  if (list == nullptr) return expected;
  if (list->size() > limits.tensors_max) {
    return fail(Errc::quota, std::to_string(list->size()) + " expected digests; the limit is " +
                                 std::to_string(limits.tensors_max));
  }
  std::vector<std::string_view> seen;
  for (const auto* entry : *list) {
    const std::string_view name = view(entry->name());
    Digest digest;
    if (name.size() > limits.name_bytes_max || entry->value() == nullptr ||
        entry->value()->size() != digest.bytes.size()) {
      return fail(Errc::bad_argument, "the expected digest of " +
                                          std::string(name.substr(0, limits.name_bytes_max)) +
                                          " has not 32 bytes, or its name is too long");
    }
    digest.length = static_cast<std::uint8_t>(digest.bytes.size());
    std::copy(entry->value()->begin(), entry->value()->end(), digest.bytes.begin());
    expected.emplace_back(name, digest);
    seen.push_back(name);
  }
  std::sort(seen.begin(), seen.end());
  if (const auto twice = std::adjacent_find(seen.begin(), seen.end()); twice != seen.end())
    return fail(Errc::bad_argument, "tensor " + std::string(*twice) + " is expected twice");
  return expected;
}

Result<std::string> decode_name(const flatbuffers::String* text, const char* what) {
  const std::string_view name = view(text);
  if (name.empty()) return fail(Errc::bad_argument, std::string("the ") + what + " has no name");
  if (name.size() > kNameBytesMax) {
    return fail(Errc::bad_argument, std::string("the name of the ") + what + " is longer than " +
                                        std::to_string(kNameBytesMax) + " bytes");
  }
  if (name.find_first_of(" /") != std::string_view::npos) {
    return fail(Errc::bad_argument, std::string("the name of the ") + what + ", " +
                                        in_quotes(name) + ", holds a space or '/'");
  }
  if (const auto problem = name_problem(name, kNameBytesMax)) {
    return fail(Errc::bad_argument, std::string(what) + " " + in_quotes(name) + ": " + *problem);
  }
  return std::string(name);
}

Result<RegisterRequest> decode(const wire::RegisterModule& message, const ManifestLimits& limits) {
  RegisterRequest request;
  REFIT_TRY_ASSIGN(request.module, decode_name(message.module_name(), "module"));
  REFIT_TRY(bounded(count(message.regions()), limits.regions_max, request.module, "regions"));
  REFIT_TRY(bounded(count(message.tensors()), limits.tensors_max, request.module, "tensors"));
  REFIT_TRY(
      bounded(count(message.name_map()), limits.name_rules_max, request.module, "name rules"));
  REFIT_TRY(bounded(count(message.layer_buffers()), limits.layer_buffers_max, request.module,
                    "layer buffers"));
  request.residency_base = message.residency_base();
  if (message.layer_buffers() != nullptr) {
    for (const auto* buffer : *message.layer_buffers())
      request.layer_buffers.push_back(buffer->bytes());
    if (request.residency_base > kLayerBuffersMax - request.layer_buffers.size()) {
      return fail(Errc::bad_argument,
                  request.module + ": " + std::to_string(request.layer_buffers.size()) +
                      " residency words from number " + std::to_string(request.residency_base) +
                      " on; a session has " + std::to_string(kLayerBuffersMax));
    }
  }
  if (message.regions() != nullptr) {
    std::size_t pieces = 0;
    for (const auto* region : *message.regions()) pieces += count(region->pieces());
    REFIT_TRY(bounded(pieces, kDevicePiecesMax, request.module, "pieces of device memory"));
    for (const auto* region : *message.regions()) {
      REFIT_TRY_ASSIGN(auto claim,
                       decode_region(*region, request.module + ": region " +
                                                  std::to_string(request.regions.size())));
      request.regions.push_back(std::move(claim));
    }
  }
  if (count(message.event()) != 0) {
    EventClaim event;
    if (!copy_exactly(message.event(), event.handle) ||
        !copy_exactly(message.event_device(), event.device.bytes)) {
      return fail(Errc::bad_argument,
                  request.module + ": an event is a handle of 64 bytes and a device of 16");
    }
    request.event = event;
  }
  BoundedCopy copy;
  if (message.tensors() != nullptr) {
    request.tensors.reserve(message.tensors()->size());
    for (const auto* tensor : *message.tensors()) {
      TensorSpec spec;
      spec.name = copy.text(tensor->name());
      spec.dtype = static_cast<DType>(tensor->dtype());
      spec.shape = copy.dims(tensor->shape());
      spec.strides = copy.dims(tensor->strides());
      spec.region = tensor->region();
      spec.offset_bytes = tensor->offset();
      spec.global_shape = copy.dims(tensor->global_shape());
      spec.box_offset = copy.dims(tensor->box_offset());
      spec.layer_buffer = tensor->layer_buffer();
      spec.layer_offset_bytes = tensor->layer_offset();
      request.tensors.push_back(std::move(spec));
    }
  }
  if (message.name_map() != nullptr) {
    for (const auto* rule : *message.name_map()) {
      request.name_map.push_back(
          {copy.text(rule->pattern()), copy.text(rule->target()), rule->part(), rule->parts()});
    }
  }
  if (copy.overspent()) {
    return fail(Errc::bad_manifest,
                request.module + ": the names and shapes add up to more than a message may have (" +
                    std::to_string(kPayloadBytesMax) + " bytes)");
  }
  request.version = message.version();
  request.transaction = from_wire(message.transaction());
  request.poisoned = message.poisoned();
  request.selection = message.selection();
  request.asleep = message.asleep();
  return request;
}

}  // namespace refit::daemon
