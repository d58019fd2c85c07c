// Copy loops for bytes that will not be read again soon: non-temporal stores where the CPU has
// them, memcpy elsewhere.
//
// Any thread; pure functions over two ranges that do not overlap. Knows nothing of tensors, pools
// or SIGBUS. After non-temporal stores the bytes are ordered for other cores only by copy_fence().
#pragma once

#include <cstddef>
#include <cstdint>

namespace refit {

using CopyFunction = void (*)(void* target, const void* source, std::size_t bytes) noexcept;

/// One way to copy, for the bench and the tests; everything else calls copy_bytes().
struct CopyKernel {
  const char* name;
  CopyFunction copy;
  bool supported;   ///< by this CPU and this kernel's saved registers
  bool prefetches;  ///< reads ahead of itself, which pays on some CPUs and costs on others
};

/// Runs below this many bytes are left to memcpy: their target lines are partly shared with the
/// neighbours, and the stream is too short to save the read for ownership.
inline constexpr std::size_t kNonTemporalBytesMin = 4096;

/// Every kernel: memcpy, rep_movsb, nt_avx2 and nt_avx512 with and without prefetch. Static
/// storage, `count` entries.
[[nodiscard]] const CopyKernel* copy_kernels(std::size_t* count) noexcept;

/// Copies with the best kernel of this CPU. The ranges must not overlap; any alignment.
void copy_bytes(void* target, const void* source, std::size_t bytes) noexcept;

/// The name of the kernel that copy_bytes() takes for long runs.
[[nodiscard]] const char* copy_kernel_name() noexcept;

/// Orders this thread's non-temporal stores before its next store; call it before telling anybody
/// that bytes are there.
void copy_fence() noexcept;

}  // namespace refit
