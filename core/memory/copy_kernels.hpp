// Copy loops for bytes that will not be read again soon: non-temporal stores where the CPU has
// them, memcpy elsewhere.
//
// Any thread; pure functions over two ranges that do not overlap. Knows nothing of tensors, pools
// or SIGBUS. After non-temporal stores the bytes are ordered for other cores only by copy_fence().
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace refit {

using CopyFunction = void (*)(void* target, const void* source, std::size_t bytes) noexcept;

/// One way to copy.
struct CopyKernel {
  const char* name;
  CopyFunction copy;
  bool supported;  ///< by this CPU and this kernel's saved registers
};

/// Runs below this many bytes are left to memcpy: their target lines are partly shared with the
/// neighbours, and the stream is too short to save the read for ownership.
inline constexpr std::size_t kNonTemporalBytesMin = 4096;

inline constexpr std::size_t kLineBytes = 64;  ///< of a cache

/// From `address` to the next start of a cache line; 0 at one.
[[nodiscard]] inline std::size_t bytes_to_line(const void* address) noexcept {
  return (kLineBytes - reinterpret_cast<std::uintptr_t>(address) % kLineBytes) % kLineBytes;
}

/// Every kernel: memcpy, rep_movsb, and with avx2 and avx512 one stream of non-temporal stores, one
/// with prefetch, and four pages at once. Static storage, `count` entries.
[[nodiscard]] const CopyKernel* copy_kernels(std::size_t* count) noexcept;

/// The kernels of which one wins on some machine or other; which, only a trial on it tells. All are
/// supported here. The first is the best guess.
struct CopyCandidates {
  static constexpr std::size_t kCountMax = 4;
  std::array<const CopyKernel*, kCountMax> kernels{};
  std::size_t count = 0;
};
[[nodiscard]] const CopyCandidates& copy_candidates() noexcept;

/// Copies with the first candidate, short runs with memcpy. The ranges must not overlap; any
/// alignment.
void copy_bytes(void* target, const void* source, std::size_t bytes) noexcept;

/// Orders this thread's non-temporal stores before its next store; call it before telling anybody
/// that bytes are there.
void copy_fence() noexcept;

}  // namespace refit
