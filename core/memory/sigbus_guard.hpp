// Turns a SIGBUS that client memory raises (a truncated or punched file under a mapping) into an
// error of that client.
//
// Any thread; each guard protects the thread that runs it and nobody else. Knows addresses only: no
// sessions, no regions, no copies. Outside a guard, or at an address that no guard covers, SIGBUS
// does what it did before.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "refit/result.hpp"

namespace refit {

/// Bytes of client memory that a guarded section may touch.
struct GuardedRange {
  const void* base = nullptr;
  std::size_t bytes = 0;
};

/// Installs the process's SIGBUS handler; main() calls it once, before threads. Calling it again is
/// harmless. The action that it finds is kept and gets every SIGBUS that is not a guard's.
[[nodiscard]] Result<void> install_sigbus_handler();

/// Decides in the signal handler whether `address` is client memory: async-signal-safe, no locks,
/// no allocation.
using GuardCovers = bool (*)(const void* context, std::uintptr_t address) noexcept;

/// Runs `body(body_context)` on this thread; false if it ended in a SIGBUS at a covered address.
///
/// A fault leaves `body` by siglongjmp: **no destructor between the fault and this call runs**. So
/// the frames that are live while client memory is touched own nothing: no lock, string, vector or
/// allocation made inside `body` may be alive then (what the caller made before is fine). Values
/// that `body` changed through pointers keep what was written last; objects whose method was
/// interrupted (a Hasher) are reset by the caller. Guards nest. Costs no system call.
[[nodiscard]] bool run_guarded_if(GuardCovers covers, const void* covers_context,
                                  void (*body)(void* context), void* body_context) noexcept;

/// As above, for the union of `count` ranges. An empty range covers nothing.
[[nodiscard]] bool run_guarded(const GuardedRange* ranges, std::size_t count,
                               void (*body)(void* context), void* body_context) noexcept;

/// As above, for any callable that returns nothing and does not throw.
template <typename F>
[[nodiscard]] bool run_guarded(const GuardedRange* ranges, std::size_t count, F&& body) noexcept {
  using Body = std::remove_reference_t<F>;
  return run_guarded(
      ranges, count, [](void* context) { (*static_cast<Body*>(context))(); },
      const_cast<void*>(static_cast<const void*>(std::addressof(body))));
}

template <typename F>
[[nodiscard]] bool run_guarded(const void* base, std::size_t bytes, F&& body) noexcept {
  const GuardedRange range{base, bytes};
  return run_guarded(&range, 1, body);
}

}  // namespace refit
