// Streaming hashes and the walk over strided tensors.
//
// Any thread. While tensor bytes are read no live frame here owns anything, so that a SIGBUS guard
// may leave it by siglongjmp. Knows nothing of where the memory comes from.
#include "digest/digest.hpp"

#include <openssl/evp.h>
#ifdef REFIT_XXHASH_DISPATCHES
#include <xxh_x86dispatch.h>  // the names of xxhash.h, with a choice at run time behind them
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <variant>

#include "digest/sha256.hpp"
#include "refit/result.hpp"

namespace refit {

namespace {

// Each kind of hash has update, finish and reset, and like Sha256 no frame of theirs owns anything.

// A failure in here means a broken OpenSSL or no memory: no answer to a peer could be right after
// that.
class OpensslSha256 {
 public:
  // Fetched once: a fetch per digest takes a lock and a hash lookup in the provider store.
  OpensslSha256() : md_(EVP_MD_fetch(nullptr, "SHA256", nullptr)), context_(EVP_MD_CTX_new()) {
    REFIT_ASSERT(md_ != nullptr && context_ != nullptr);
    reset();
  }
  // OpenSSL 3.0 frees and takes its 112 bytes of SHA-256 state here; there is no call that keeps
  // them.
  void reset() { REFIT_ASSERT(EVP_DigestInit_ex2(context_.get(), md_.get(), nullptr) == 1); }
  void update(std::span<const std::byte> bytes) {
    REFIT_ASSERT(EVP_DigestUpdate(context_.get(), bytes.data(), bytes.size()) == 1);
  }
  [[nodiscard]] Sha256::Value finish() {
    Sha256::Value value;
    REFIT_ASSERT(EVP_DigestFinal_ex(context_.get(), value.data(), nullptr) == 1);
    reset();
    return value;
  }

 private:
  struct Free {
    void operator()(EVP_MD* md) const noexcept { EVP_MD_free(md); }
    void operator()(EVP_MD_CTX* context) const noexcept { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD, Free> md_;
  std::unique_ptr<EVP_MD_CTX, Free> context_;
};

class Xxh3 {
 public:
  Xxh3() : state_(XXH3_createState()) {
    REFIT_ASSERT(state_ != nullptr);
    reset();
  }
  void reset() { REFIT_ASSERT(XXH3_128bits_reset(state_.get()) == XXH_OK); }
  void update(std::span<const std::byte> bytes) {
    REFIT_ASSERT(XXH3_128bits_update(state_.get(), bytes.data(), bytes.size()) == XXH_OK);
  }
  [[nodiscard]] std::array<std::uint8_t, 16> finish() {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_.get()));
    reset();
    return std::to_array(canonical.digest);
  }

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const noexcept { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

using AnyHash = std::variant<Sha256, OpensslSha256, Xxh3>;

}  // namespace

struct Hasher::State {
  AnyHash hash;
};

Sha256By fastest_sha256() noexcept {
  return Sha256::supported() ? Sha256By::cpu : Sha256By::openssl;
}

Hasher::Hasher(DigestKind kind, Sha256By sha256) : state_(std::make_unique<State>()) {
  REFIT_ASSERT(sha256 == Sha256By::openssl || Sha256::supported());
  if (kind == DigestKind::xxh3) {
    state_->hash.emplace<Xxh3>();
  } else if (sha256 == Sha256By::openssl) {
    state_->hash.emplace<OpensslSha256>();
  }
}

Hasher::~Hasher() = default;
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;

void Hasher::reset() {
  std::visit([](auto& hash) { hash.reset(); }, state_->hash);
}

void Hasher::update(std::span<const std::byte> bytes) {
  if (bytes.empty()) return;
  std::visit([bytes](auto& hash) { hash.update(bytes); }, state_->hash);
}

void Hasher::update_two(Hasher& a, std::span<const std::byte>& from_a, Hasher& b,
                        std::span<const std::byte>& from_b) {
  auto* const two_a = std::get_if<Sha256>(&a.state_->hash);
  auto* const two_b = std::get_if<Sha256>(&b.state_->hash);
  if (two_a != nullptr && two_b != nullptr) {
    Sha256::update_two(*two_a, from_a, *two_b, from_b);
    return;
  }
  a.update(std::exchange(from_a, {}));
  b.update(std::exchange(from_b, {}));
}

Digest Hasher::finish() {
  Digest digest;
  std::visit(
      [&digest](auto& hash) {
        const auto value = hash.finish();
        std::copy(value.begin(), value.end(), digest.bytes.begin());
        digest.length = static_cast<std::uint8_t>(value.size());
      },
      state_->hash);
  return digest;
}

void ElementReader::begin(const TensorView& tensor) {
  const TensorSpec& spec = *tensor.spec;
  at_ = nullptr;
  loop_count_ = 0;
  const std::uint64_t element = element_bytes(spec.dtype);
  for (const std::uint64_t extent : spec.shape) {
    if (extent == 0) return;
  }
  at_ = tensor.data;
  run_bytes_ = element;
  std::uint64_t dense_elements = 1;  // the stride that would continue row-major order
  for (std::size_t i = spec.shape.size(); i-- > 0;) {
    const std::uint64_t extent = spec.shape[i];
    if (extent == 1) continue;
    const std::uint64_t stride = spec.strides.empty() ? dense_elements : spec.strides[i];
    dense_elements *= extent;
    if (loop_count_ == 0 && stride * element == run_bytes_) {
      run_bytes_ *= extent;
    } else {
      add_loop(extent, stride * element);
    }
  }
}

void ElementReader::add_loop(std::uint64_t count, std::uint64_t stride_bytes) {
  if (loop_count_ > 0) {
    Loop& inner = loops_[loop_count_ - 1];
    if (stride_bytes == inner.count * inner.stride_bytes) {
      inner.count *= count;
      return;
    }
  }
  REFIT_ASSERT(loop_count_ < kLoopsMax);
  loops_[loop_count_++] = {count, stride_bytes, 0};
}

void ElementReader::advance() noexcept {
  for (std::size_t i = 0; i < loop_count_; ++i) {
    Loop& loop = loops_[i];
    at_ += loop.stride_bytes;
    if (++loop.index < loop.count) return;
    at_ -= loop.count * loop.stride_bytes;
    loop.index = 0;
  }
  at_ = nullptr;
}

std::span<const std::byte> ElementReader::next() {
  if (at_ == nullptr) return {};
  // A call into the hash costs more than a few hundred bytes of hashing, so short runs are gathered
  // first.
  constexpr std::size_t kGatheredRunMax = 1024;
  if (run_bytes_ > kGatheredRunMax || loop_count_ == 0) {
    const std::span<const std::byte> run(at_, run_bytes_);
    advance();
    return run;
  }
  std::size_t used = 0;
  for (; at_ != nullptr && used + run_bytes_ <= gathered_.size(); advance()) {
    std::memcpy(gathered_.data() + used, at_, run_bytes_);
    used += run_bytes_;
  }
  return {gathered_.data(), used};
}

std::uint64_t span_bytes(const TensorSpec& spec) noexcept {
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < spec.shape.size(); ++i) last += (spec.shape[i] - 1) * spec.strides[i];
  return (last + 1) * element_bytes(spec.dtype);
}

void update_with_elements(Hasher& hasher, const TensorView& tensor) {
  ElementReader elements;
  elements.begin(tensor);
  for (auto piece = elements.next(); !piece.empty(); piece = elements.next()) hasher.update(piece);
}

void update_with_prefix(Hasher& hasher, DigestKind kind, const TensorSpec& spec) {
  if (kind != DigestKind::sglang) return;
  hasher.update(dtype_name(spec.dtype));
  hasher.update(shape_repr(spec.shape));
}

Digest digest_tensor(Hasher& hasher, DigestKind kind, const TensorView& tensor) {
  update_with_prefix(hasher, kind, *tensor.spec);
  update_with_elements(hasher, tensor);
  return hasher.finish();
}

bool comes_first(const TensorSpec& a, const TensorSpec& b) noexcept {
  // std::string compares as unsigned bytes, which for UTF-8 is the order of code points.
  return a.name < b.name;
}

Digest digest_module(Hasher& hasher, std::vector<TensorView> tensors) {
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorView& a, const TensorView& b) { return comes_first(*a.spec, *b.spec); });
  for (const TensorView& tensor : tensors) {
    hasher.update(tensor.spec->name);
    update_with_elements(hasher, tensor);
  }
  return hasher.finish();
}

std::uint64_t payload_hash(const void* data, std::size_t bytes) noexcept {
  return XXH3_64bits(data, bytes);
}

}  // namespace refit
