// The two memory regions of a session, as both peers see them: plain data, fixed offsets, no
// pointers.
//
// The client writes the request region, the daemon writes the response region, and each consumer's
// cursor stands in the region that it writes, so that neither peer ever needs to write where the
// other does. All shared words are 64-bit or 32-bit lock-free atomics, used sequentially consistent
// (TSan does not model fences). kLayoutHash covers every offset and size; peers with another hash
// are refused at the handshake.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "ipc/shared_word.hpp"

namespace refit {

inline constexpr std::uint32_t kRingSlots = 64;
inline constexpr std::uint32_t kModulesMax = 64;
/// Residency words of one session, for the layer buffers of all of its modules.
inline constexpr std::uint32_t kLayerBuffersMax = 1024;
inline constexpr std::size_t kRequestRegionBytes = std::size_t{4} << 20;
inline constexpr std::size_t kResponseRegionBytes = std::size_t{4} << 20;
/// The longest payload of one message; what does not fit is refused by its sender.
inline constexpr std::size_t kPayloadBytesMax = (std::size_t{3} << 20) + (std::size_t{1} << 19);

static_assert(std::atomic<std::uint64_t>::is_always_lock_free);
static_assert(std::atomic<std::uint32_t>::is_always_lock_free);

/// The longest payload that stands in the slot itself, so that a request like ping and its answer
/// are one cache line each.
inline constexpr std::size_t kInlinePayloadBytes = 24;

/// One message. Copied out of shared memory before any field is looked at.
struct Descriptor {
  std::uint16_t opcode = 0;
  std::uint16_t reserved = 0;
  std::uint32_t payload_bytes = 0;
  std::uint64_t request_id = 0;
  std::uint64_t payload_xxh3 = 0;  ///< XXH3-64; finds a broken client, not a hostile one
  /// Of a payload longer than `payload`: from the start of the region that holds this descriptor.
  std::uint64_t payload_offset = 0;
  std::byte payload[kInlinePayloadBytes] = {};  ///< one that is not longer
};

/// A descriptor and the word that publishes it: one cache line.
struct alignas(64) RingSlot {
  SharedWord<std::uint64_t> sequence;  ///< 1 + position of the message that stands here, or 0
  Descriptor descriptor;
};
static_assert(sizeof(RingSlot) == 64);

/// What a transaction did to a module: valid while the module's word points at it.
struct ModuleRecord {
  SharedWord<std::uint64_t> transaction_high;
  SharedWord<std::uint64_t> transaction_low;
  SharedWord<std::uint64_t> version;
  SharedWord<std::uint64_t> selection;  ///< XXH3-64 of the names of the tensors that it writes
};

/// The state word of one module and the two records that it switches between (see
/// ipc/state_word.hpp).
struct alignas(128) ModuleBlock {
  SharedWord<std::uint64_t> word;
  SharedWord<std::uint64_t> name;  ///< XXH3-64 of the module's name, stored before the first word
  std::uint64_t reserved[6];
  ModuleRecord records[2];
};

struct RequestRegion {
  alignas(64) SharedWord<std::uint64_t> response_head;  ///< client's consumer position
  alignas(64) SharedWord<std::uint32_t> client_awake;   ///< 1: the client reads by itself, no
                                                        ///< doorbell needed
  alignas(64) SharedWord<std::uint64_t> gate_answer;    ///< engine: {epoch, ready | withdrawn}
  /// Requests up to this id were given up by the client (its deadline passed).
  alignas(64) SharedWord<std::uint64_t> abandoned_request;
  RingSlot requests[kRingSlots];
  /// Engine: where each layer buffer is now (ipc/residency_word.hpp).
  alignas(64) SharedWord<std::uint64_t> residency[kLayerBuffersMax];
  alignas(4096) std::byte arena[1];  ///< the rest of the region
};

struct ResponseRegion {
  alignas(64) SharedWord<std::uint64_t> request_head;  ///< daemon's consumer position
  alignas(64) SharedWord<std::uint32_t> daemon_awake;  ///< 1: the daemon reads by itself, no
                                                       ///< doorbell needed
  alignas(64)
      SharedWord<std::uint64_t> gate;  ///< engine: {epoch, flags, closed | prepare | released}
  alignas(128) ModuleBlock modules[kModulesMax];
  RingSlot responses[kRingSlots];
  alignas(4096) std::byte payload[1];  ///< the rest of the region
};

namespace detail {

constexpr std::uint64_t mix(std::uint64_t hash, std::uint64_t value) noexcept {
  for (int i = 0; i < 8; ++i) hash = (hash ^ ((value >> (8 * i)) & 0xff)) * 0x100000001b3ULL;
  return hash;
}

template <typename... Values>
constexpr std::uint64_t mix_all(Values... values) noexcept {
  std::uint64_t hash = 0xcbf29ce484222325ULL;
  ((hash = mix(hash, static_cast<std::uint64_t>(values))), ...);
  return hash;
}

}  // namespace detail

/// FNV-1a over every offsetof and sizeof above. Golden in tests/unit/ipc/shared_layout_test.cpp.
inline constexpr std::uint64_t kLayoutHash = detail::mix_all(
    kRingSlots, kModulesMax, kLayerBuffersMax, kRequestRegionBytes, kResponseRegionBytes,
    sizeof(Descriptor), offsetof(Descriptor, opcode), offsetof(Descriptor, payload_bytes),
    offsetof(Descriptor, request_id), offsetof(Descriptor, payload_xxh3),
    offsetof(Descriptor, payload_offset), offsetof(Descriptor, payload), sizeof(RingSlot),
    offsetof(RingSlot, sequence), offsetof(RingSlot, descriptor), sizeof(ModuleRecord),
    offsetof(ModuleRecord, transaction_high), offsetof(ModuleRecord, transaction_low),
    offsetof(ModuleRecord, version), offsetof(ModuleRecord, selection), sizeof(ModuleBlock),
    offsetof(ModuleBlock, word), offsetof(ModuleBlock, name), offsetof(ModuleBlock, records),
    sizeof(RequestRegion), offsetof(RequestRegion, response_head),
    offsetof(RequestRegion, client_awake), offsetof(RequestRegion, gate_answer),
    offsetof(RequestRegion, abandoned_request), offsetof(RequestRegion, requests),
    offsetof(RequestRegion, residency), offsetof(RequestRegion, arena), sizeof(ResponseRegion),
    offsetof(ResponseRegion, request_head), offsetof(ResponseRegion, daemon_awake),
    offsetof(ResponseRegion, gate), offsetof(ResponseRegion, modules),
    offsetof(ResponseRegion, responses), offsetof(ResponseRegion, payload));

}  // namespace refit
