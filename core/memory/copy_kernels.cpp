// The copy loops and the choice among them.
//
// Any thread. Target attributes instead of compiler flags, so that one binary runs on any x86-64
// and the wide registers are only touched after cpuid said so.
#include "memory/copy_kernels.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// TSan does not see non-temporal stores. Its build copies with memcpy, so that it can find a job
// that is told done too early; the kernels themselves are still reached through copy_kernels().
#if defined(__SANITIZE_THREAD__)
#define REFIT_COPY_VISIBLE_TO_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define REFIT_COPY_VISIBLE_TO_TSAN 1
#endif
#endif
#ifndef REFIT_COPY_VISIBLE_TO_TSAN
#define REFIT_COPY_VISIBLE_TO_TSAN 0
#endif

namespace refit {
namespace {

void copy_memcpy(void* target, const void* source, std::size_t bytes) noexcept {
  if (bytes != 0) std::memcpy(target, source, bytes);
}

#if defined(__x86_64__)

void copy_rep_movsb(void* target, const void* source, std::size_t bytes) noexcept {
  asm volatile("rep movsb" : "+D"(target), "+S"(source), "+c"(bytes) : : "memory");
}

// Copies up to the target's next line boundary, of `bytes` that reach further, and moves all three
// on.
void copy_head(std::byte*& to, const std::byte*& from, std::size_t& bytes) noexcept {
  const std::size_t head = bytes_to_line(to);
  copy_memcpy(to, from, head);
  to += head;
  from += head;
  bytes -= head;
}

// Both loops read `kPrefetchBytes` ahead with a hint that keeps the source out of the outer caches;
// 0 means no prefetch. The hint may name bytes past the end, even unmapped ones: it never faults.
template <std::size_t kPrefetchBytes>
void prefetch_step(const std::byte* from) noexcept {
  if constexpr (kPrefetchBytes != 0) {
    _mm_prefetch(from + kPrefetchBytes, _MM_HINT_NTA);
    _mm_prefetch(from + kPrefetchBytes + kLineBytes, _MM_HINT_NTA);
    _mm_prefetch(from + kPrefetchBytes + 2 * kLineBytes, _MM_HINT_NTA);
    _mm_prefetch(from + kPrefetchBytes + 3 * kLineBytes, _MM_HINT_NTA);
  }
}

constexpr std::size_t kStepBytes = 4 * kLineBytes;

template <std::size_t kPrefetchBytes>
[[gnu::target("avx2")]] void copy_nt_avx2(void* target, const void* source,
                                          std::size_t bytes) noexcept {
  if (bytes < kNonTemporalBytesMin) return copy_memcpy(target, source, bytes);
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  copy_head(to, from, bytes);
  for (; bytes >= kStepBytes; bytes -= kStepBytes, to += kStepBytes, from += kStepBytes) {
    prefetch_step<kPrefetchBytes>(from);
    const auto* in = reinterpret_cast<const __m256i*>(from);
    auto* out = reinterpret_cast<__m256i*>(to);
    const __m256i a = _mm256_loadu_si256(in);
    const __m256i b = _mm256_loadu_si256(in + 1);
    const __m256i c = _mm256_loadu_si256(in + 2);
    const __m256i d = _mm256_loadu_si256(in + 3);
    const __m256i e = _mm256_loadu_si256(in + 4);
    const __m256i f = _mm256_loadu_si256(in + 5);
    const __m256i g = _mm256_loadu_si256(in + 6);
    const __m256i h = _mm256_loadu_si256(in + 7);
    _mm256_stream_si256(out, a);
    _mm256_stream_si256(out + 1, b);
    _mm256_stream_si256(out + 2, c);
    _mm256_stream_si256(out + 3, d);
    _mm256_stream_si256(out + 4, e);
    _mm256_stream_si256(out + 5, f);
    _mm256_stream_si256(out + 6, g);
    _mm256_stream_si256(out + 7, h);
  }
  copy_memcpy(to, from, bytes);
}

template <std::size_t kPrefetchBytes>
[[gnu::target("avx512f")]] void copy_nt_avx512(void* target, const void* source,
                                               std::size_t bytes) noexcept {
  if (bytes < kNonTemporalBytesMin) return copy_memcpy(target, source, bytes);
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  copy_head(to, from, bytes);
  for (; bytes >= kStepBytes; bytes -= kStepBytes, to += kStepBytes, from += kStepBytes) {
    prefetch_step<kPrefetchBytes>(from);
    const __m512i a = _mm512_loadu_si512(from);
    const __m512i b = _mm512_loadu_si512(from + kLineBytes);
    const __m512i c = _mm512_loadu_si512(from + 2 * kLineBytes);
    const __m512i d = _mm512_loadu_si512(from + 3 * kLineBytes);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), a);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + kLineBytes), b);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 2 * kLineBytes), c);
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 3 * kLineBytes), d);
  }
  copy_memcpy(to, from, bytes);
}

// Four pages at once, a few lines of each in turn: one stream waits for one row of memory at a
// time, four keep more of its banks busy. Measured on an Intel Xeon of model 167: 1.43 x one
// stream. What is shorter than four pages, and the rest, is one stream.
constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kPagesAtOnce = 4;
constexpr std::size_t kBlockBytes = kPagesAtOnce * kPageBytes;
constexpr std::size_t kPageStepBytes = 2 * kLineBytes;
constexpr std::size_t kPageAheadBytes = 256;

[[gnu::target("avx2")]] void copy_pages_avx2(void* target, const void* source,
                                             std::size_t bytes) noexcept {
  if (bytes < kBlockBytes + kLineBytes) return copy_nt_avx2<0>(target, source, bytes);
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  copy_head(to, from, bytes);
  for (; bytes >= kBlockBytes; bytes -= kBlockBytes, to += kBlockBytes, from += kBlockBytes) {
    for (std::size_t step = 0; step < kPageBytes; step += kPageStepBytes) {
      for (std::size_t page = step; page < kBlockBytes; page += kPageBytes) {
        _mm_prefetch(from + page + kPageAheadBytes, _MM_HINT_T0);
        _mm_prefetch(from + page + kPageAheadBytes + kLineBytes, _MM_HINT_T0);
        const auto* in = reinterpret_cast<const __m256i*>(from + page);
        auto* out = reinterpret_cast<__m256i*>(to + page);
        const __m256i a = _mm256_loadu_si256(in);
        const __m256i b = _mm256_loadu_si256(in + 1);
        const __m256i c = _mm256_loadu_si256(in + 2);
        const __m256i d = _mm256_loadu_si256(in + 3);
        _mm256_stream_si256(out, a);
        _mm256_stream_si256(out + 1, b);
        _mm256_stream_si256(out + 2, c);
        _mm256_stream_si256(out + 3, d);
      }
    }
  }
  copy_nt_avx2<0>(to, from, bytes);
}

[[gnu::target("avx512f")]] void copy_pages_avx512(void* target, const void* source,
                                                  std::size_t bytes) noexcept {
  if (bytes < kBlockBytes + kLineBytes) return copy_nt_avx512<0>(target, source, bytes);
  auto* to = static_cast<std::byte*>(target);
  const auto* from = static_cast<const std::byte*>(source);
  copy_head(to, from, bytes);
  for (; bytes >= kBlockBytes; bytes -= kBlockBytes, to += kBlockBytes, from += kBlockBytes) {
    for (std::size_t step = 0; step < kPageBytes; step += kPageStepBytes) {
      for (std::size_t page = step; page < kBlockBytes; page += kPageBytes) {
        _mm_prefetch(from + page + kPageAheadBytes, _MM_HINT_T0);
        _mm_prefetch(from + page + kPageAheadBytes + kLineBytes, _MM_HINT_T0);
        const __m512i a = _mm512_loadu_si512(from + page);
        const __m512i b = _mm512_loadu_si512(from + page + kLineBytes);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + page), a);
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + page + kLineBytes), b);
      }
    }
  }
  copy_nt_avx512<0>(to, from, bytes);
}

#endif  // __x86_64__

struct KernelTable {
  static constexpr std::size_t kCountMax = 8;
  CopyKernel kernels[kCountMax];
  std::size_t count = 0;
  CopyCandidates candidates;

  const CopyKernel& add(const CopyKernel& kernel) noexcept { return kernels[count++] = kernel; }
  void propose(const CopyKernel& kernel) noexcept {
    candidates.kernels[candidates.count++] = &kernel;
  }

  KernelTable() noexcept {
    const CopyKernel& plain = add({"memcpy", copy_memcpy, true});
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") != 0;
    const bool avx512 = __builtin_cpu_supports("avx512f") != 0;
    // Measured between populated tmpfs mappings: 512 bytes ahead gain nothing anywhere.
    constexpr std::size_t kAheadBytes = 2048;
    const CopyKernel& rep = add({"rep_movsb", copy_rep_movsb, true});
    const CopyKernel& nt512 = add({"nt_avx512", copy_nt_avx512<0>, avx512});
    const CopyKernel& nt2 = add({"nt_avx2", copy_nt_avx2<0>, avx2});
    const CopyKernel& ahead512 = add({"nt_avx512_prefetch", copy_nt_avx512<kAheadBytes>, avx512});
    const CopyKernel& ahead2 = add({"nt_avx2_prefetch", copy_nt_avx2<kAheadBytes>, avx2});
    const CopyKernel& pages512 = add({"nt_avx512_pages", copy_pages_avx512, avx512});
    const CopyKernel& pages2 = add({"nt_avx2_pages", copy_pages_avx2, avx2});
    if (avx2 && !REFIT_COPY_VISIBLE_TO_TSAN) {
      // The two widths are equal.
      propose(avx512 ? pages512 : pages2);
      propose(avx512 ? nt512 : nt2);
      propose(avx512 ? ahead512 : ahead2);
      propose(rep);
      return;
    }
#endif
    propose(plain);
  }
};

const KernelTable& kernel_table() noexcept {
  static const KernelTable instance;
  return instance;
}

}  // namespace

const CopyKernel* copy_kernels(std::size_t* count) noexcept {
  *count = kernel_table().count;
  return kernel_table().kernels;
}

const CopyCandidates& copy_candidates() noexcept { return kernel_table().candidates; }

void copy_bytes(void* target, const void* source, std::size_t bytes) noexcept {
  if (bytes < kNonTemporalBytesMin) return copy_memcpy(target, source, bytes);
  kernel_table().candidates.kernels.front()->copy(target, source, bytes);
}

void copy_fence() noexcept {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace refit
