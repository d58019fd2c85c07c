// The SIGBUS handler and the per-thread chain of guards.
//
// The handler runs on whichever thread faulted and reads only that thread's chain. The previous
// action is the one piece of process-wide state, because the kernel's signal table is; it is
// written before the handler can run.
#include "memory/sigbus_guard.hpp"

#include <pthread.h>
#include <ucontext.h>

#include <atomic>
#include <cerrno>
#include <csetjmp>
#include <csignal>

namespace refit {
namespace {

struct Guard {
  sigjmp_buf jump;
  GuardCovers covers;
  const void* context;
  Guard* outer;
};

// initial-exec: a lazily allocated thread-local would call malloc inside the handler. volatile: the
// handler reads it between any two instructions of its own thread.
[[gnu::tls_model("initial-exec")]] thread_local Guard* volatile innermost_guard = nullptr;

struct sigaction previous_action;

// An address of a fault, as opposed to one that kill() or an unconsumed memory error reports.
bool is_synchronous_fault(const siginfo_t& info) noexcept {
  return info.si_code == BUS_ADRERR || info.si_code == BUS_OBJERR || info.si_code == BUS_MCEERR_AR;
}

void pass_on(int signal, siginfo_t* info, void* context) noexcept {
  if ((previous_action.sa_flags & SA_SIGINFO) != 0) {
    previous_action.sa_sigaction(signal, info, context);
    return;
  }
  if (previous_action.sa_handler == SIG_IGN && info->si_code <= 0) return;
  if (previous_action.sa_handler != SIG_DFL && previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(signal);
    return;
  }
  struct sigaction fallback {};
  fallback.sa_handler = SIG_DFL;
  sigaction(signal, &fallback, nullptr);
  // A fault happens again when the instruction is run again, now with the default action and the
  // true registers in the core file. A sent signal does not.
  if (info->si_code <= 0) raise(signal);
}

void on_sigbus(int signal, siginfo_t* info, void* context) noexcept {
  const int saved_errno = errno;
  if (is_synchronous_fault(*info)) {
    const auto address = reinterpret_cast<std::uintptr_t>(info->si_addr);
    for (Guard* guard = innermost_guard; guard != nullptr; guard = guard->outer) {
      if (guard->covers(guard->context, address)) {
        // The jump leaves the handler with SIGBUS blocked. Restoring the mask here, and not by
        // sigsetjmp, keeps the system call out of every guard that sees no fault.
        pthread_sigmask(SIG_SETMASK, &static_cast<const ucontext_t*>(context)->uc_sigmask, nullptr);
        errno = saved_errno;
        siglongjmp(guard->jump, 1);
      }
    }
  }
  pass_on(signal, info, context);
  errno = saved_errno;
}

struct RangeList {
  const GuardedRange* ranges;
  std::size_t count;
};

bool covers_ranges(const void* context, std::uintptr_t address) noexcept {
  const auto* list = static_cast<const RangeList*>(context);
  for (std::size_t i = 0; i < list->count; ++i) {
    const auto base = reinterpret_cast<std::uintptr_t>(list->ranges[i].base);
    // The kernel may report the start of the page instead of the byte.
    constexpr std::uintptr_t kPageMask = 4095;
    const std::uintptr_t first = base & ~kPageMask;
    if (list->ranges[i].bytes != 0 && address >= first &&
        address - first < list->ranges[i].bytes + (base - first)) {
      return true;
    }
  }
  return false;
}

}  // namespace

Result<void> install_sigbus_handler() {
  struct sigaction action {};
  action.sa_sigaction = on_sigbus;
  action.sa_flags = SA_SIGINFO;
  sigemptyset(&action.sa_mask);
  struct sigaction current {};
  if (sigaction(SIGBUS, nullptr, &current) != 0) return fail_os("sigaction(SIGBUS)", errno);
  if ((current.sa_flags & SA_SIGINFO) != 0 && current.sa_sigaction == on_sigbus) return {};
  previous_action = current;
  if (sigaction(SIGBUS, &action, nullptr) != 0) return fail_os("sigaction(SIGBUS)", errno);
  return {};
}

// noinline: the frame that sigsetjmp saves holds nothing but what is not changed after it.
[[gnu::noinline]] bool run_guarded_if(GuardCovers covers, const void* covers_context,
                                      void (*body)(void* context), void* body_context) noexcept {
  Guard guard;
  guard.covers = covers;
  guard.context = covers_context;
  guard.outer = innermost_guard;
  if (sigsetjmp(guard.jump, 0) != 0) {
    innermost_guard = guard.outer;
    return false;
  }
  innermost_guard = &guard;
  // The accesses of an inlined body stay between the two stores, as this thread's handler sees it.
  std::atomic_signal_fence(std::memory_order_seq_cst);
  body(body_context);
  std::atomic_signal_fence(std::memory_order_seq_cst);
  innermost_guard = guard.outer;
  return true;
}

bool run_guarded(const GuardedRange* ranges, std::size_t count, void (*body)(void* context),
                 void* body_context) noexcept {
  const RangeList list{ranges, count};
  return run_guarded_if(covers_ranges, &list, body, body_context);
}

}  // namespace refit
