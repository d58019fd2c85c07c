// Casts of many elements on the host, in the widest registers that this CPU has.
//
// Any thread; pure functions over two ranges that do not overlap, of any alignment. Knows nothing
// of tensors, pools or SIGBUS. Long targets are written as copy_kernels.hpp writes them: for other
// cores they are ordered by copy_fence().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "memory/cast.hpp"

namespace refit {

/// Casts `count` elements that lie one behind the other, through the caches.
using CastFunction = void (*)(std::byte* target, const std::byte* source,
                              std::size_t count) noexcept;

/// One way to compile the loops.
struct CastKernel {
  const char* name;
  std::array<CastFunction, kCastCount> casts;  ///< by Cast; null for Cast::none
  bool supported;                              ///< by this CPU and this kernel's saved registers
};

/// Every kernel, the one that is taken first among those that are supported. Static storage.
[[nodiscard]] const CastKernel* cast_kernels(std::size_t* count) noexcept;

/// Casts with the first supported kernel, long runs past the caches. `cast` is not Cast::none.
void cast_elements(Cast cast, std::byte* target, const std::byte* source,
                   std::size_t count) noexcept;

/// As cast_elements, for elements that lie apart.
void cast_strided(Cast cast, std::byte* target, const std::byte* source, std::size_t count,
                  std::uint64_t target_stride_bytes, std::uint64_t source_stride_bytes) noexcept;

}  // namespace refit
