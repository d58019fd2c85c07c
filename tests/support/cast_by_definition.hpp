// Casts one element after the other, by the functions that tests of their own hold against
// libtorch: what the loops, the plans and the kernels are compared with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "memory/cast.hpp"
#include "memory/cast_elements.hpp"

namespace refit::test {

template <typename From, typename To>
void cast_one(To (*element)(From) noexcept, void* target, const void* source) {
  From in;
  std::memcpy(&in, source, sizeof in);
  const To out = element(in);
  std::memcpy(target, &out, sizeof out);
}

/// Writes `target_bytes` of the target; for Cast::none copies them.
inline void cast_by_definition(Cast cast, void* target, const void* source,
                               std::size_t target_bytes) {
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  for (std::size_t done = 0; done < target_bytes; done += target_unit_bytes(cast)) {
    switch (cast) {
      case Cast::none:
        *to = *from;
        break;
#define REFIT_X(in, out)                      \
  case Cast::in##_to_##out:                   \
    cast_one(&cast::in##_to_##out, to, from); \
    break;
        REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
    }
    to += target_unit_bytes(cast);
    from += source_unit_bytes(cast);
  }
}

}  // namespace refit::test
