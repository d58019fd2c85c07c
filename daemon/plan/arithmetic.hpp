// Arithmetic on numbers that a peer chose: every product and sum says whether it fits into 64 bits.
//
// Pure, any thread. Knows tensors as extents and strides only; no regions, no names.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <utility>

#include "refit/types.hpp"

namespace refit::daemon {

using MaybeBytes = std::optional<std::uint64_t>;

[[nodiscard]] inline MaybeBytes checked_add(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t sum = 0;
  if (__builtin_add_overflow(a, b, &sum)) return std::nullopt;
  return sum;
}

[[nodiscard]] inline MaybeBytes checked_multiply(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t product = 0;
  if (__builtin_mul_overflow(a, b, &product)) return std::nullopt;
  return product;
}

/// True if one extent is zero: no element, whatever the others are.
[[nodiscard]] inline bool is_empty(const Dims& shape) noexcept {
  for (const std::uint64_t extent : shape) {
    if (extent == 0) return true;
  }
  return false;
}

/// Elements of a shape; 1 for no dimensions. nullopt where the number does not fit.
[[nodiscard]] inline MaybeBytes element_count(const Dims& shape) noexcept {
  if (is_empty(shape)) return 0;
  MaybeBytes count = 1;
  for (const std::uint64_t extent : shape) {
    count = checked_multiply(*count, extent);
    if (!count) return std::nullopt;
  }
  return count;
}

/// Elements from a tensor's first to its last one, both included; 0 for an empty tensor. `strides`
/// has the length of `shape`. A dimension of extent 1 never moves, so its stride may be anything.
[[nodiscard]] inline MaybeBytes span_elements(const Dims& shape, const Dims& strides) noexcept {
  if (is_empty(shape)) return 0;
  MaybeBytes span = 1;
  for (std::size_t d = 0; d < shape.size(); ++d) {
    const MaybeBytes reach = checked_multiply(shape[d] - 1, strides[d]);
    if (!reach) return std::nullopt;
    span = checked_add(*span, *reach);
    if (!span) return std::nullopt;
  }
  return span;
}

/// Sorts the few dimensions of a tensor. Not std::sort: on arrays this short g++ 12 warns of
/// accesses that never happen (its insertion sort threshold of 16).
template <typename T, typename Before>
void sort_few(T* entries, std::size_t count, Before before) {
  for (std::size_t i = 1; i < count; ++i) {
    for (std::size_t k = i; k > 0 && before(entries[k], entries[k - 1]); --k) {
      std::swap(entries[k], entries[k - 1]);
    }
  }
}

}  // namespace refit::daemon
