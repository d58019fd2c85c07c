// The loops around cast_elements.hpp, compiled for several widths of registers, and the choice
// among them.
//
// Any thread. Target attributes instead of compiler flags, as in copy_kernels.cpp.
#include "memory/cast_kernels.hpp"

#include <algorithm>
#include <cstring>

#include "memory/cast_elements.hpp"
#include "memory/copy_kernels.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace refit {
namespace {

// What a loop leaves to the copy that goes past the caches: it stays in the first of them.
constexpr std::size_t kCastBytes = 2 * kNonTemporalBytesMin;

template <Cast kCast>
struct Element;
template <std::size_t kBytes>
struct Bits;
template <>
struct Bits<2> {
  using Type = std::uint16_t;
};
template <>
struct Bits<4> {
  using Type = std::uint32_t;
};

#define REFIT_X(from, to)                                               \
  template <>                                                           \
  struct Element<Cast::from##_to_##to> {                                \
    using From = Bits<element_bytes(DType::from)>::Type;                \
    using To = Bits<element_bytes(DType::to)>::Type;                    \
    [[gnu::always_inline]] static constexpr To of(From bits) noexcept { \
      return cast::from##_to_##to(bits);                                \
    }                                                                   \
  };
REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X

template <Cast kCast>
constexpr std::uint64_t kFrom = sizeof(typename Element<kCast>::From);
template <Cast kCast>
constexpr std::uint64_t kTo = sizeof(typename Element<kCast>::To);

// memcpy, because a client's tensor need not be aligned to its element.
template <Cast kCast>
[[gnu::always_inline]] inline void cast_loop(std::byte* __restrict target,
                                             const std::byte* __restrict source, std::size_t count,
                                             std::uint64_t target_stride,
                                             std::uint64_t source_stride) noexcept {
  typename Element<kCast>::From in;
  typename Element<kCast>::To out;
  for (std::size_t i = 0; i < count; ++i) {
    std::memcpy(&in, source + i * source_stride, sizeof in);
    out = Element<kCast>::of(in);
    std::memcpy(target + i * target_stride, &out, sizeof out);
  }
}

// Apart from each other: inlined into one function, g++ 12 vectorises some and leaves others.
template <Cast kCast>
[[gnu::noinline]] void cast_plain(std::byte* target, const std::byte* source,
                                  std::size_t count) noexcept {
  cast_loop<kCast>(target, source, count, kTo<kCast>, kFrom<kCast>);
}

#if defined(__x86_64__)
template <Cast kCast>
[[gnu::noinline, gnu::target("avx2")]] void cast_avx2(std::byte* target, const std::byte* source,
                                                      std::size_t count) noexcept {
  cast_loop<kCast>(target, source, count, kTo<kCast>, kFrom<kCast>);
}

template <Cast kCast>
[[gnu::noinline, gnu::target("avx512f,avx512bw,avx512vl")]] void cast_avx512(
    std::byte* target, const std::byte* source, std::size_t count) noexcept {
  cast_loop<kCast>(target, source, count, kTo<kCast>, kFrom<kCast>);
}

// The cast that nearly every trainer needs, by hand: reading ahead and writing past the caches in
// one loop takes 0.7 of the time of a loop and a copy (an AMD EPYC, one thread).
// cast::float32_to_bfloat16, eight at once.
[[gnu::target("avx2")]] inline __m256i to_bfloat16(const std::byte* source) noexcept {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  const __m256i high = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  const __m256i quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x0040));
  return _mm256_blendv_epi8(rounded, quiet, nan);
}

[[gnu::target("avx2")]] void stream_bfloat16(std::byte* target, const std::byte* source,
                                             std::size_t lines) noexcept {
  constexpr std::size_t kAheadBytes = 2048;
  constexpr int kInOrder = 0xd8;  // What packing leaves interleaved in the two halves.
  for (; lines > 0; --lines, target += kLineBytes, source += 2 * kLineBytes) {
    _mm_prefetch(source + kAheadBytes, _MM_HINT_NTA);
    _mm_prefetch(source + kAheadBytes + kLineBytes, _MM_HINT_NTA);
    const __m256i low = _mm256_packus_epi32(to_bfloat16(source), to_bfloat16(source + 32));
    const __m256i high = _mm256_packus_epi32(to_bfloat16(source + 64), to_bfloat16(source + 96));
    auto* const out = reinterpret_cast<__m256i*>(target);
    _mm256_stream_si256(out, _mm256_permute4x64_epi64(low, kInOrder));
    _mm256_stream_si256(out + 1, _mm256_permute4x64_epi64(high, kInOrder));
  }
}
#endif

struct CastTable {
  static constexpr std::size_t kCountMax = 3;
  CastKernel kernels[kCountMax];
  std::size_t count = 0;
  const CastKernel* taken = nullptr;

  void add(const CastKernel& kernel) noexcept {
    kernels[count] = kernel;
    if (taken == nullptr && kernel.supported) taken = &kernels[count];
    ++count;
  }

  CastTable() noexcept {
#define REFIT_AVX512(from, to) , cast_avx512<Cast::from##_to_##to>
#define REFIT_AVX2(from, to) , cast_avx2<Cast::from##_to_##to>
#define REFIT_PLAIN(from, to) , cast_plain<Cast::from##_to_##to>
#if defined(__x86_64__)
    __builtin_cpu_init();
    add({"avx512",
         {nullptr REFIT_CAST_TABLE(REFIT_AVX512)},
         __builtin_cpu_supports("avx512bw") != 0 && __builtin_cpu_supports("avx512vl") != 0});
    add({"avx2", {nullptr REFIT_CAST_TABLE(REFIT_AVX2)}, __builtin_cpu_supports("avx2") != 0});
#endif
    add({"plain", {nullptr REFIT_CAST_TABLE(REFIT_PLAIN)}, true});
#undef REFIT_AVX512
#undef REFIT_AVX2
#undef REFIT_PLAIN
  }
};

const CastTable& cast_table() noexcept {
  static const CastTable instance;
  return instance;
}

}  // namespace

const CastKernel* cast_kernels(std::size_t* count) noexcept {
  *count = cast_table().count;
  return cast_table().kernels;
}

void cast_elements(Cast cast, std::byte* target, const std::byte* source,
                   std::size_t count) noexcept {
  const CastFunction loop = cast_table().taken->casts[static_cast<std::size_t>(cast)];
  const std::size_t from = source_unit_bytes(cast);
  const std::size_t to = target_unit_bytes(cast);
#if defined(__x86_64__)
  // Where copies have a choice they stream, which takes AVX2; under TSan they have none.
  if (cast == Cast::float32_to_bfloat16 && copy_candidates().count > 1 &&
      count * to >= kNonTemporalBytesMin && reinterpret_cast<std::uintptr_t>(target) % to == 0) {
    const std::size_t head = bytes_to_line(target) / to;
    const std::size_t lines = (count - head) * to / kLineBytes;
    const std::size_t streamed = head + lines * kLineBytes / to;
    loop(target, source, head);
    stream_bfloat16(target + head * to, source + head * from, lines);
    loop(target + streamed * to, source + streamed * from, count - streamed);
    return;
  }
#endif
  alignas(kLineBytes) std::byte block[kCastBytes + kLineBytes];
  while (count * to >= kNonTemporalBytesMin) {
    // The first block ends where a line of the target does.
    const std::size_t elements = std::min(count, (kCastBytes + bytes_to_line(target)) / to);
    loop(block, source, elements);
    copy_bytes(target, block, elements * to);
    target += elements * to;
    source += elements * from;
    count -= elements;
  }
  loop(target, source, count);
}

void cast_strided(Cast cast, std::byte* target, const std::byte* source, std::size_t count,
                  std::uint64_t target_stride_bytes, std::uint64_t source_stride_bytes) noexcept {
  switch (cast) {
    case Cast::none:
      return;
#define REFIT_X(from, to)                                                              \
  case Cast::from##_to_##to:                                                           \
    return cast_loop<Cast::from##_to_##to>(target, source, count, target_stride_bytes, \
                                           source_stride_bytes);
      REFIT_CAST_TABLE(REFIT_X)
#undef REFIT_X
  }
}

}  // namespace refit
