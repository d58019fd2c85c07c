// The casts that there are: a tensor may be written to a target of another dtype where one of these
// leads there.
//
// Plain values, any thread. How an element is cast stands in cast_elements.hpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

#include "refit/types.hpp"

namespace refit {

// X(source dtype, target dtype), each a member of DType.
#define REFIT_CAST_TABLE(X) \
  X(float32, bfloat16)      \
  X(float32, float16)       \
  X(bfloat16, float32)      \
  X(float16, float32)       \
  X(bfloat16, float16)      \
  X(float16, bfloat16)

enum class Cast : std::uint8_t {
  none,  ///< the bytes as they are
#define REFIT_X(from, to) from##_to_##to,
  REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
};

/// How many there are, `none` included.
inline constexpr std::size_t kCastCount = 1
#define REFIT_X(from, to) +1
    REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
    ;

/// How elements of `from` become elements of `to`; nothing where no cast leads there.
constexpr std::optional<Cast> cast_between(DType from, DType to) noexcept {
  if (from == to) return Cast::none;
#define REFIT_X(source, target) \
  if (from == DType::source && to == DType::target) return Cast::source##_to_##target;
  REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  return std::nullopt;
}

/// The least that can be cast by itself, in bytes of the target; 1 for Cast::none.
constexpr std::size_t target_unit_bytes(Cast cast) noexcept {
  switch (cast) {
    case Cast::none:
      break;
#define REFIT_X(from, to)    \
  case Cast::from##_to_##to: \
    return element_bytes(DType::to);
      REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  }
  return 1;
}

/// As target_unit_bytes(), of the source.
constexpr std::size_t source_unit_bytes(Cast cast) noexcept {
  switch (cast) {
    case Cast::none:
      break;
#define REFIT_X(from, to)    \
  case Cast::from##_to_##to: \
    return element_bytes(DType::from);
      REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  }
  return 1;
}

/// The bytes of the source that become `target_bytes`, which are whole units.
constexpr std::uint64_t source_bytes_of(Cast cast, std::uint64_t target_bytes) noexcept {
  return target_bytes / target_unit_bytes(cast) * source_unit_bytes(cast);
}

}  // namespace refit
