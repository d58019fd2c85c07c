// Streaming hashes and the walk over strided tensors.
//
// Any thread. While tensor bytes are read no live frame here owns anything, so that a SIGBUS guard
// may leave it by siglongjmp. Knows nothing of where the memory comes from.
#include "digest/digest.hpp"

#include <openssl/evp.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "refit/result.hpp"

namespace refit {

struct Hasher::State {
  EVP_MD* md = nullptr;
  EVP_MD_CTX* context = nullptr;
  XXH3_state_t* xxh3 = nullptr;

  State() = default;
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    EVP_MD_CTX_free(context);
    EVP_MD_free(md);
    XXH3_freeState(xxh3);
  }
};

// A failure in here means a broken OpenSSL or no memory: no answer to a peer could be right after
// that.
Hasher::Hasher(DigestKind kind) : state_(std::make_unique<State>()) {
  if (kind == DigestKind::xxh3) {
    state_->xxh3 = XXH3_createState();
    REFIT_ASSERT(state_->xxh3 != nullptr);
  } else {
    // Fetched once: a fetch per digest takes a lock and a hash lookup in the provider store.
    state_->md = EVP_MD_fetch(nullptr, "SHA256", nullptr);
    state_->context = EVP_MD_CTX_new();
    REFIT_ASSERT(state_->md != nullptr && state_->context != nullptr);
  }
  reset();
}

Hasher::~Hasher() = default;
Hasher::Hasher(Hasher&&) noexcept = default;
Hasher& Hasher::operator=(Hasher&&) noexcept = default;

void Hasher::reset() {
  if (state_->xxh3 != nullptr) {
    REFIT_ASSERT(XXH3_128bits_reset(state_->xxh3) == XXH_OK);
    return;
  }
  // OpenSSL 3.0 frees and takes its 112 bytes of SHA-256 state here; there is no call that keeps
  // them.
  REFIT_ASSERT(EVP_DigestInit_ex2(state_->context, state_->md, nullptr) == 1);
}

void Hasher::update(const void* data, std::size_t bytes) {
  if (bytes == 0) return;
  if (state_->xxh3 != nullptr) {
    REFIT_ASSERT(XXH3_128bits_update(state_->xxh3, data, bytes) == XXH_OK);
    return;
  }
  REFIT_ASSERT(EVP_DigestUpdate(state_->context, data, bytes) == 1);
}

Digest Hasher::finish() {
  Digest digest;
  if (state_->xxh3 != nullptr) {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(state_->xxh3));
    std::memcpy(digest.bytes.data(), canonical.digest, sizeof canonical.digest);
    digest.length = sizeof canonical.digest;
  } else {
    unsigned int length = 0;
    REFIT_ASSERT(EVP_DigestFinal_ex(state_->context, digest.bytes.data(), &length) == 1);
    digest.length = static_cast<std::uint8_t>(length);
  }
  reset();
  return digest;
}

namespace {

struct ElementLoop {
  std::uint64_t count = 1;
  std::uint64_t stride_bytes = 0;
  std::uint64_t index = 0;
};

// 2^64 elements cannot be hashed, so at most 63 dimensions have more than one.
constexpr std::size_t kLoopsMax = 64;

// The walk over one tensor: outer loops (innermost first) around contiguous runs. Trivially
// destructible.
struct ElementWalk {
  std::array<ElementLoop, kLoopsMax> loops{};
  std::size_t loop_count = 0;
  std::uint64_t run_bytes = 0;  // 0: the tensor has no elements
};

ElementWalk walk_of(const TensorSpec& spec) {
  ElementWalk walk;
  const std::uint64_t element = element_bytes(spec.dtype);
  for (const std::uint64_t extent : spec.shape) {
    if (extent == 0) return walk;
  }
  walk.run_bytes = element;
  std::uint64_t dense_elements = 1;  // the stride that would continue row-major order
  bool in_run = true;
  for (std::size_t i = spec.shape.size(); i-- > 0;) {
    const std::uint64_t extent = spec.shape[i];
    if (extent == 1) continue;
    const std::uint64_t stride = spec.strides.empty() ? dense_elements : spec.strides[i];
    dense_elements *= extent;
    const std::uint64_t stride_bytes = stride * element;
    if (in_run && stride_bytes == walk.run_bytes) {
      walk.run_bytes *= extent;
      continue;
    }
    in_run = false;
    if (walk.loop_count > 0) {
      ElementLoop& inner = walk.loops[walk.loop_count - 1];
      if (stride_bytes == inner.count * inner.stride_bytes) {
        inner.count *= extent;
        continue;
      }
    }
    REFIT_ASSERT(walk.loop_count < kLoopsMax);
    walk.loops[walk.loop_count++] = {extent, stride_bytes, 0};
  }
  return walk;
}

// Moves to the next run; false after the last.
bool advance(ElementWalk& walk, const std::byte*& at) noexcept {
  for (std::size_t i = 0; i < walk.loop_count; ++i) {
    ElementLoop& loop = walk.loops[i];
    at += loop.stride_bytes;
    if (++loop.index < loop.count) return true;
    at -= loop.count * loop.stride_bytes;
    loop.index = 0;
  }
  return false;
}

}  // namespace

void update_with_elements(Hasher& hasher, const TensorView& tensor) {
  ElementWalk walk = walk_of(*tensor.spec);
  if (walk.run_bytes == 0) return;
  const std::byte* at = tensor.data;
  // A call into the hash costs more than a few hundred bytes of hashing, so short runs are gathered
  // first.
  std::array<std::byte, 8192> gathered;
  constexpr std::size_t kGatheredRunMax = 1024;
  if (walk.run_bytes > kGatheredRunMax || walk.loop_count == 0) {
    do {
      hasher.update(at, walk.run_bytes);
    } while (advance(walk, at));
    return;
  }
  std::size_t used = 0;
  do {
    if (used + walk.run_bytes > gathered.size()) {
      hasher.update(gathered.data(), used);
      used = 0;
    }
    std::memcpy(gathered.data() + used, at, walk.run_bytes);
    used += walk.run_bytes;
  } while (advance(walk, at));
  hasher.update(gathered.data(), used);
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

void sort_for_module_digest(std::vector<TensorView>& tensors) {
  // std::string compares as unsigned bytes, which for UTF-8 is the order of code points.
  std::sort(tensors.begin(), tensors.end(),
            [](const TensorView& a, const TensorView& b) { return a.spec->name < b.spec->name; });
}

Digest digest_sorted_module(Hasher& hasher, const std::vector<TensorView>& tensors) {
  for (const TensorView& tensor : tensors) {
    hasher.update(tensor.spec->name);
    update_with_elements(hasher, tensor);
  }
  return hasher.finish();
}

Digest digest_module(Hasher& hasher, std::vector<TensorView> tensors) {
  sort_for_module_digest(tensors);
  return digest_sorted_module(hasher, tensors);
}

std::uint64_t payload_hash(const void* data, std::size_t bytes) noexcept {
  return XXH3_64bits(data, bytes);
}

}  // namespace refit
