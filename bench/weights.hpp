// The bytes of a model in an arena: filling them, changing them between steps, and proving where
// they went.
//
// Everything here runs outside the timed parts. Hashes come from OpenSSL directly, by code of its
// own, so that they can judge the daemon's. Entered by one thread, which uses all cores for large
// models.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "model.hpp"

namespace refit::bench {

/// A model's tensors at their addresses.
struct Arena {
  std::byte* data = nullptr;
  Layout layout;
};

/// Writes every byte of [data, data + bytes) from a counter-based generator.
void fill(std::byte* data, std::uint64_t bytes, std::uint64_t seed);

/// Changes 8 bytes in every 4 KiB of every source tensor, from its first byte on; `step` decides
/// the change.
void perturb(const Model& model, const Arena& source, std::uint64_t step);

/// How many of the places that perturb() changes differ between source and target.
[[nodiscard]] std::uint64_t places_that_differ(const Model& model, const Arena& source,
                                               const Arena& target);
/// How many places perturb() changes.
[[nodiscard]] std::uint64_t places(const Model& model);

using Sha256 = std::array<std::uint8_t, 32>;

/// SHA-256 of the bytes that every target tensor must hold, computed from the source's. In target
/// order.
[[nodiscard]] std::vector<Sha256> expected_sha256(const Model& model, const Arena& source);

/// SHA-256 of `bytes` as one OpenSSL stream on the calling thread.
[[nodiscard]] Sha256 sha256_stream(const std::byte* data, std::uint64_t bytes);

}  // namespace refit::bench
