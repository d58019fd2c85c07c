// FlatBuffers at the trust boundary: verification with tight limits, and the small helpers both
// sides share.
//
// A payload is always private memory here: whoever calls has copied it out of what the peer can
// write.
#pragma once

#include <flatbuffers/flatbuffers.h>

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "refit/types.hpp"
#include "refit_generated.h"

namespace refit {

/// The deepest table in the schema is Reply -> body -> element -> string; tables are bounded by the
/// largest manifest.
inline constexpr flatbuffers::uoffset_t kVerifyDepthMax = 6;
inline constexpr flatbuffers::uoffset_t kVerifyTablesMax = 200'000;

/// The verified root of `data`, or nullptr. FlatBuffers' own size assertion is kept out of reach by
/// the bound before it.
template <typename Root>
const Root* verified_root(const void* data, std::size_t bytes) {
  if (bytes < 8 || bytes >= FLATBUFFERS_MAX_BUFFER_SIZE) return nullptr;
  flatbuffers::Verifier verifier(static_cast<const std::uint8_t*>(data), bytes, kVerifyDepthMax,
                                 kVerifyTablesMax);
  if (!verifier.VerifyBuffer<Root>(nullptr)) return nullptr;
  return flatbuffers::GetRoot<Root>(data);
}

inline std::string_view view(const flatbuffers::String* text) {
  return text == nullptr ? std::string_view{} : std::string_view{text->c_str(), text->size()};
}

inline TransactionId from_wire(const wire::TransactionId* id) {
  return id == nullptr ? TransactionId{} : TransactionId{id->high(), id->low()};
}

inline wire::TransactionId to_wire(const TransactionId& id) { return {id.high, id.low}; }

}  // namespace refit
