// How long this machine takes for one memcpy between shared pages: what a refit is compared with.
//
// Called from one thread; makes its own for the time of a call.
#pragma once

#include <cstddef>

namespace dit {

struct MemcpyTime {
  double seconds = 0;
  unsigned threads = 0;
};

/// The best of a few copies over 1, 2, 4... threads up to the cores, so that memcpy is met at its
/// best. The threads exist before the clock starts.
MemcpyTime best_memcpy(std::byte* target, const std::byte* source, std::size_t bytes);

}  // namespace dit
