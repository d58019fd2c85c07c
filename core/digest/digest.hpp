// Hashes of tensor bytes where they lie: SHA-256 through OpenSSL's EVP, XXH3-128 through xxHash.
//
// Any thread; a Hasher belongs to one thread at a time. Reads client memory in place and knows
// nothing of SIGBUS: callers hold the guard of memory/sigbus_guard.hpp. A fault leaves these
// functions without running destructors, which is safe for all but digest_module (it owns a
// vector), and leaves the Hasher to be reset().
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "refit/types.hpp"

namespace refit {

/// One streaming hash of any kind. Reusable: finish() resets it.
class Hasher {
 public:
  explicit Hasher(DigestKind kind);
  ~Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;

  void update(const void* data, std::size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  [[nodiscard]] Digest finish();
  /// Forgets what was fed: after a fault interrupted update().
  void reset();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// One tensor in memory: `data` is the address of its first element (of the spec's offset), valid
/// for the whole span that shape and strides reach.
struct TensorView {
  const TensorSpec* spec = nullptr;
  const std::byte* data = nullptr;
};

/// Feeds a tensor's bytes to `hasher` in row-major order, whatever its strides. No prefix.
void update_with_elements(Hasher& hasher, const TensorView& tensor);

/// Feeds what the digest of one tensor begins with: of `sglang` dtype and shape, of others nothing.
void update_with_prefix(Hasher& hasher, DigestKind kind, const TensorSpec& spec);

/// The digest of one tensor. `sglang` hashes str(dtype), repr(shape) and the row-major bytes, as
/// SGLang's compute_tensor_sha256; `raw` and `xxh3` the bytes alone.
[[nodiscard]] Digest digest_tensor(Hasher& hasher, DigestKind kind, const TensorView& tensor);

/// The digest of a module: for every tensor in bytewise order of names, the name and the row-major
/// bytes, in one stream, as SGLang's compute_weights_checksum. `xxh3` uses XXH3-128 for the same
/// stream.
[[nodiscard]] Digest digest_module(Hasher& hasher, std::vector<TensorView> tensors);

/// The two halves of digest_module, for memory that may fault: sort before the guarded section,
/// hash inside it.
void sort_for_module_digest(std::vector<TensorView>& tensors);
[[nodiscard]] Digest digest_sorted_module(Hasher& hasher, const std::vector<TensorView>& tensors);

/// XXH3-64 of a message payload, as the ring's descriptors carry it.
[[nodiscard]] std::uint64_t payload_hash(const void* data, std::size_t bytes) noexcept;

}  // namespace refit
