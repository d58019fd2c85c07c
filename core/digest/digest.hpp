// Hashes of tensor bytes where they lie: SHA-256 by the CPU's instructions where it has them
// (sha256.hpp), else through OpenSSL's EVP; XXH3-128 through xxHash.
//
// Any thread; a Hasher belongs to one thread at a time. Reads client memory in place and knows
// nothing of SIGBUS: callers hold the guard of memory/sigbus_guard.hpp. A fault leaves these
// functions without running destructors, which is safe for all but digest_module (it owns a
// vector), and leaves the Hasher to be reset().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "refit/types.hpp"

namespace refit {

/// What computes SHA-256.
enum class Sha256By : std::uint8_t {
  openssl,
  cpu,  ///< its own instructions; only where Sha256::supported()
};
[[nodiscard]] Sha256By fastest_sha256() noexcept;

/// One streaming hash of any kind. Reusable: finish() resets it.
class Hasher {
 public:
  explicit Hasher(DigestKind kind, Sha256By sha256 = fastest_sha256());
  ~Hasher();
  Hasher(Hasher&&) noexcept;
  Hasher& operator=(Hasher&&) noexcept;

  void update(std::span<const std::byte> bytes);
  void update(std::string_view text) { update(std::as_bytes(std::span(text))); }
  [[nodiscard]] Digest finish();
  /// Forgets what was fed: after a fault interrupted update().
  void reset();

  /// Feeds `a` from the front of `from_a` and `b` from that of `from_b`, and takes what was fed
  /// from the spans. Returns when at least one of them is used up; both may be. Two streams of
  /// SHA-256 by the CPU take little longer than one of them; of other hashes one is fed after the
  /// other.
  static void update_two(Hasher& a, std::span<const std::byte>& from_a, Hasher& b,
                         std::span<const std::byte>& from_b);

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

/// The bytes of one tensor in row-major order, whatever its strides, piece by piece.
class ElementReader {
 public:
  /// Nothing of the spec is kept. Before the first tensor there are no bytes.
  void begin(const TensorView& tensor);
  /// The next piece, empty at the end. It lies in the tensor itself, or where runs are short in
  /// this object, until the next call; such runs are read now.
  [[nodiscard]] std::span<const std::byte> next();

 private:
  struct Loop {
    std::uint64_t count = 1;
    std::uint64_t stride_bytes = 0;
    std::uint64_t index = 0;
  };
  void add_loop(std::uint64_t count, std::uint64_t stride_bytes);
  void advance() noexcept;

  // 2^64 elements cannot be hashed, so at most 63 dimensions have more than one.
  static constexpr std::size_t kLoopsMax = 64;
  std::array<Loop, kLoopsMax> loops_;  ///< around the runs, innermost first
  std::size_t loop_count_ = 0;
  std::uint64_t run_bytes_ = 0;
  const std::byte* at_ = nullptr;  ///< the next run; null behind the last one
  std::array<std::byte, 8192> gathered_;
};

/// From the first byte of the first element to behind the last one's; not of an empty tensor.
[[nodiscard]] std::uint64_t span_bytes(const TensorSpec& spec) noexcept;

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

/// The order of the tensors in a module's digest.
[[nodiscard]] bool comes_first(const TensorSpec& a, const TensorSpec& b) noexcept;

/// XXH3-64 of a message payload, as the ring's descriptors carry it.
[[nodiscard]] std::uint64_t payload_hash(const void* data, std::size_t bytes) noexcept;

}  // namespace refit
