// The walk over ops, the cutting into chunks, and the threads that take them.
//
// Threads: submitters enter submit() only; pool threads run serve(). A job is entered and left
// under the pool's mutex, and only while it is first in the queue, so that the thread that leaves a
// job last knows that nobody can touch it again. Inside the guard no frame owns anything: a fault
// leaves it by siglongjmp.
#include "memory/copy_pool.hpp"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <system_error>

#include "memory/cast_kernels.hpp"
#include "memory/copy_kernels.hpp"
#include "memory/sigbus_guard.hpp"

namespace refit {
namespace {

using Clock = std::chrono::steady_clock;

template <std::size_t kBytes>
void copy_fixed_runs(std::byte* target, const std::byte* source, std::uint64_t count,
                     std::uint64_t target_stride, std::uint64_t source_stride) noexcept {
  for (std::uint64_t i = 0; i < count; ++i) {
    std::memcpy(target + i * target_stride, source + i * source_stride, kBytes);
  }
}

void copy_run(CopyFunction copy, std::byte* target, const std::byte* source,
              std::uint64_t bytes) noexcept {
  if (bytes < kNonTemporalBytesMin) {
    std::memcpy(target, source, bytes);
  } else {
    copy(target, source, bytes);
  }
}

// One run of an op, or a part of it that is whole elements.
void move_run(CopyFunction copy, Cast cast, std::byte* target, const std::byte* source,
              std::uint64_t bytes) noexcept {
  if (cast == Cast::none) return copy_run(copy, target, source, bytes);
  cast_elements(cast, target, source, bytes / target_unit_bytes(cast));
}

// Whole runs of one innermost loop. Element-sized runs (a transposed tensor) are copied without a
// call each.
void copy_runs(CopyFunction copy, Cast cast, std::byte* target, const std::byte* source,
               std::uint64_t run_bytes, std::uint64_t count, std::uint64_t target_stride,
               std::uint64_t source_stride) noexcept {
  if (cast != Cast::none) {
    if (run_bytes == target_unit_bytes(cast))
      return cast_strided(cast, target, source, count, target_stride, source_stride);
    for (std::uint64_t i = 0; i < count; ++i)
      move_run(copy, cast, target + i * target_stride, source + i * source_stride, run_bytes);
    return;
  }
  switch (run_bytes) {
    case 1:
      return copy_fixed_runs<1>(target, source, count, target_stride, source_stride);
    case 2:
      return copy_fixed_runs<2>(target, source, count, target_stride, source_stride);
    case 4:
      return copy_fixed_runs<4>(target, source, count, target_stride, source_stride);
    case 8:
      return copy_fixed_runs<8>(target, source, count, target_stride, source_stride);
    case 16:
      return copy_fixed_runs<16>(target, source, count, target_stride, source_stride);
    default:
      break;
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    copy_run(copy, target + i * target_stride, source + i * source_stride, run_bytes);
  }
}

// Writes target bytes [position, position + bytes) of one op; `bytes` is at least 1 and stays
// inside the op. With a cast both are whole elements.
void copy_part(CopyFunction copy, const CopyOp& op, std::uint64_t position,
               std::uint64_t bytes) noexcept {
  if (op.loop_count == 0) {
    move_run(copy, op.cast, op.target + position, op.source + source_bytes_of(op.cast, position),
             bytes);
    return;
  }
  std::uint64_t run = position / op.run_bytes;
  std::uint64_t run_offset = position % op.run_bytes;
  const CopyOp::Loop& inner = op.loops[op.loop_count - 1];
  while (bytes > 0) {
    const auto [source, target] = op.ends_of(run, op.loop_count);
    if (run_offset != 0 || bytes < op.run_bytes) {
      const std::uint64_t part = std::min(bytes, op.run_bytes - run_offset);
      move_run(copy, op.cast, target + run_offset, source + source_bytes_of(op.cast, run_offset),
               part);
      bytes -= part;
      run_offset = 0;
      ++run;
      continue;
    }
    const std::uint64_t runs = std::min(inner.count - run % inner.count, bytes / op.run_bytes);
    copy_runs(copy, op.cast, target, source, op.run_bytes, runs, inner.target_stride_bytes,
              inner.source_stride_bytes);
    bytes -= runs * op.run_bytes;
    run += runs;
  }
}

// What a thread copies right now, for its own signal handler. Relaxed atomics: handler and thread
// are one thread.
struct CurrentOp {
  const CopyOp* ops = nullptr;
  std::atomic<std::uint32_t> index{0};
};

bool span_covers(std::uintptr_t base, std::uint64_t bytes, std::uintptr_t address) noexcept {
  // The kernel may report the start of the page instead of the byte.
  constexpr std::uintptr_t kPageMask = 4095;
  const std::uintptr_t first = base & ~kPageMask;
  return address >= first && address - first < bytes + (base - first);
}

bool covers_current_op(const void* context, std::uintptr_t address) noexcept {
  const auto* current = static_cast<const CurrentOp*>(context);
  const CopyOp& op = current->ops[current->index.load(std::memory_order_relaxed)];
  std::uint64_t source_bytes = op.source_run_bytes();
  std::uint64_t target_bytes = op.run_bytes;
  for (std::uint32_t i = 0; i < op.loop_count; ++i) {
    const CopyOp::Loop& loop = op.loops[i];
    source_bytes += (loop.count - 1) * loop.source_stride_bytes;
    target_bytes += (loop.count - 1) * loop.target_stride_bytes;
  }
  return span_covers(reinterpret_cast<std::uintptr_t>(op.source), source_bytes, address) ||
         span_covers(reinterpret_cast<std::uintptr_t>(op.target), target_bytes, address);
}

void copy_from(CopyFunction copy, CurrentOp& current, std::uint32_t index, std::uint64_t position,
               std::uint64_t bytes) noexcept {
  for (; bytes > 0; ++index, position = 0) {
    const CopyOp& op = current.ops[index];
    const std::uint64_t part = std::min(bytes, op.bytes() - position);
    if (part == 0) continue;
    current.index.store(index, std::memory_order_relaxed);
    // For the compiler only: the copy stays behind the store, as this thread's handler sees it.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    copy_part(copy, op, position, part);
    bytes -= part;
  }
}

void check_op(const CopyOp& op) {
  REFIT_ASSERT(op.loop_count <= CopyOp::kDimsMax);
  REFIT_ASSERT(op.run_bytes % target_unit_bytes(op.cast) == 0);
}

long futex(std::atomic<std::uint32_t>& word, int operation, std::uint32_t value) noexcept {
  static_assert(sizeof(word) == sizeof(std::uint32_t));
  return syscall(SYS_futex, &word, operation | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

}  // namespace

CopyOutcome copy_inline(const CopyOp* ops, std::size_t count) noexcept {
  struct Body {
    CurrentOp current;
    std::size_t count;
  } body;
  body.current.ops = ops;
  body.count = count;
  const bool whole = run_guarded_if(
      covers_current_op, &body.current,
      [](void* context) {
        auto& self = *static_cast<Body*>(context);
        for (std::size_t i = 0; i < self.count; ++i) {
          check_op(self.current.ops[i]);
          copy_from(copy_bytes, self.current, static_cast<std::uint32_t>(i), 0,
                    self.current.ops[i].bytes());
        }
      },
      &body);
  copy_fence();
  if (whole) return {};
  return {CopyStatus::faulted, body.current.index.load(std::memory_order_relaxed)};
}

void CopyJob::prepare(const CopyOp* ops, std::size_t count, std::uint64_t chunk_bytes) {
  REFIT_ASSERT(!queued_ && active_threads_ == 0);
  REFIT_ASSERT(count <= UINT32_MAX && chunk_bytes > 0);
  // A short run costs a walk step and two cache misses besides its bytes.
  constexpr std::uint64_t kRunCostBytes = 256;
  constexpr std::uint64_t kTargetPage = 4096;
  ops_ = ops;
  chunks_.clear();
  bytes_ = 0;
  casts_ = std::any_of(ops, ops + count, [](const CopyOp& op) { return op.cast != Cast::none; });
  Chunk open{0, 0, 0};
  std::uint64_t open_cost = 0;
  const auto close = [&] {
    if (open.bytes > 0) chunks_.push_back(open);
    open.bytes = 0;
    open_cost = 0;
  };
  for (std::size_t i = 0; i < count; ++i) {
    const CopyOp& op = ops[i];
    check_op(op);
    const std::uint64_t total = op.bytes();
    const std::uint64_t unit = target_unit_bytes(op.cast);
    bytes_ += total;
    std::uint64_t position = 0;
    while (position < total) {
      // How far this chunk may still go: in bytes for long runs, in whole runs for short ones.
      const std::uint64_t room = chunk_bytes - std::min(chunk_bytes, open_cost);
      std::uint64_t take = 0;
      std::uint64_t cost = 0;
      const bool cut_inside_run = op.run_bytes >= kTargetPage * 4;
      if (cut_inside_run) {
        take = room;
        if (op.loop_count == 0) {
          const std::uint64_t end = reinterpret_cast<std::uintptr_t>(op.target) + position + take;
          take -= std::min(take, end % kTargetPage);
        }
        take -= take % unit;
        take = std::min(take, total - position);
        // Rather a somewhat longer chunk than a scrap.
        if (total - position - take < chunk_bytes / 8) take = total - position;
        cost = take;
      } else {
        const std::uint64_t run_cost = op.run_bytes + kRunCostBytes;
        const std::uint64_t runs =
            std::min(std::max<std::uint64_t>(room / run_cost, open.bytes == 0 ? 1 : 0),
                     (total - position) / op.run_bytes);
        take = runs * op.run_bytes;
        cost = runs * run_cost;
      }
      if (take == 0) {
        // With nothing in the chunk there is always room for a page or a run, unless chunks are
        // smaller than a page.
        if (open.bytes == 0) {
          take = std::min(std::max(chunk_bytes - chunk_bytes % unit, unit), total - position);
          cost = take;
        } else {
          close();
          continue;
        }
      }
      if (open.bytes == 0) {
        open.op = static_cast<std::uint32_t>(i);
        open.position = position;
      }
      open.bytes += take;
      open_cost += cost;
      position += take;
      if (open_cost >= chunk_bytes) close();
    }
  }
  close();
}

CopyOutcome CopyJob::work(KernelTrial& trial) noexcept {
  struct Body {
    CopyJob* job;
    CurrentOp* current;
    KernelTrial* trial;
  };
  CurrentOp current;
  current.ops = ops_;
  Body body{this, &current, &trial};
  const bool whole = run_guarded_if(
      covers_current_op, &current,
      [](void* context) {
        const auto& self = *static_cast<Body*>(context);
        CopyJob& job = *self.job;
        for (;;) {
          // Relaxed: the pool's mutex orders the job's fields before this and the copied bytes
          // before done; the counter only deals.
          const std::size_t index = job.next_chunk_.fetch_add(1, std::memory_order_relaxed);
          if (index >= job.chunks_.size()) return;
          const Chunk& chunk = job.chunks_[index];
          bool timed = false;
          const CopyKernel& kernel =
              job.casts_ ? self.trial->chosen() : self.trial->next(chunk.bytes, timed);
          const auto start = timed ? Clock::now() : Clock::time_point{};
          copy_from(kernel.copy, *self.current, chunk.op, chunk.position, chunk.bytes);
          if (!timed) continue;
          copy_fence();
          const auto took = std::chrono::nanoseconds(Clock::now() - start);
          self.trial->record(kernel, chunk.bytes, static_cast<std::uint64_t>(took.count()));
        }
      },
      &body);
  copy_fence();
  if (whole) return {};
  // What is left would be copied for nobody.
  next_chunk_.store(chunks_.size(), std::memory_order_relaxed);
  return {CopyStatus::faulted, current.index.load(std::memory_order_relaxed)};
}

Result<std::unique_ptr<CopyPool>> CopyPool::create(unsigned threads) {
  std::unique_ptr<CopyPool> pool(new CopyPool());
  REFIT_TRY(pool->start(threads));
  return pool;
}

Result<void> CopyPool::start(unsigned threads) {
  // Room for more CPUs than any kernel is built for; a fixed cpu_set_t ends at 1024.
  constexpr int kCpusMax = 8192;
  const std::size_t mask_bytes = CPU_ALLOC_SIZE(kCpusMax);
  const std::unique_ptr<cpu_set_t, void (*)(cpu_set_t*)> mask(
      CPU_ALLOC(kCpusMax), [](cpu_set_t* set) { CPU_FREE(set); });
  CPU_ZERO_S(mask_bytes, mask.get());
  std::vector<int> cpus;
  if (sched_getaffinity(0, mask_bytes, mask.get()) == 0) {
    for (int cpu = 0; cpu < kCpusMax; ++cpu) {
      if (CPU_ISSET_S(static_cast<std::size_t>(cpu), mask_bytes, mask.get())) cpus.push_back(cpu);
    }
  } else {
    pin_error_ = errno;
  }
  if (threads == 0) {
    threads = std::max(1U, cpus.empty() ? std::thread::hardware_concurrency()
                                        : static_cast<unsigned>(cpus.size()));
  }

  // Signals of the process are for its own threads; those that a fault raises must stay open.
  sigset_t blocked;
  sigfillset(&blocked);
  for (const int signal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT}) {
    sigdelset(&blocked, signal);
  }
  sigset_t before;
  if (const int error = pthread_sigmask(SIG_SETMASK, &blocked, &before); error != 0) {
    return fail_os("pthread_sigmask for the copy threads", error);
  }
  int thread_error = 0;
  try {
    threads_.reserve(threads);
    beats_ = std::make_unique<Heartbeat[]>(threads);
    for (unsigned i = 0; i < threads; ++i) threads_.emplace_back([this, i] { serve(beats_[i]); });
  } catch (const std::system_error& error) {
    thread_error = error.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (thread_error != 0) {
    return fail_os("starting copy thread " + std::to_string(threads_.size()) + " of " +
                       std::to_string(threads),
                   thread_error);
  }

  for (unsigned i = 0; i < threads; ++i) {
    const pthread_t handle = threads_[i].native_handle();
    char name[16];
    std::snprintf(name, sizeof name, "refit-copy-%u", i % 10000U);
    pthread_setname_np(handle, name);
    if (i >= cpus.size()) continue;
    CPU_ZERO_S(mask_bytes, mask.get());
    CPU_SET_S(static_cast<std::size_t>(cpus[i]), mask_bytes, mask.get());
    const int error = pthread_setaffinity_np(handle, mask_bytes, mask.get());
    if (error == 0) {
      ++pinned_count_;
    } else if (pin_error_ == 0) {
      pin_error_ = error;
    }
  }
  return {};
}

CopyPool::~CopyPool() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    wakeups_.fetch_add(1, std::memory_order_relaxed);
  }
  futex(wakeups_, FUTEX_WAKE, INT_MAX);
  for (std::thread& thread : threads_) thread.join();
}

void CopyPool::submit(CopyJob& job) noexcept {
  unsigned wake = 0;
  {
    const std::lock_guard lock(mutex_);
    REFIT_ASSERT(!job.queued_ && job.active_threads_ == 0 && job.done_ != nullptr);
    job.next_chunk_.store(0, std::memory_order_relaxed);
    job.outcome_ = {};
    job.next_ = nullptr;
    job.queued_ = true;
    (last_ != nullptr ? last_->next_ : first_) = &job;
    last_ = &job;
    const std::size_t useful = std::max<std::size_t>(1, job.chunks_.size());
    wake = static_cast<unsigned>(std::min<std::size_t>(sleepers_, useful));
    // Pairs with the load in serve(): a thread between its unlock and its futex call sees the
    // change and does not sleep.
    if (wake > 0) wakeups_.fetch_add(1, std::memory_order_relaxed);
  }
  if (wake > 0) futex(wakeups_, FUTEX_WAKE, wake);
}

void CopyPool::serve(Heartbeat& beat) noexcept {
  std::unique_lock lock(mutex_);
  for (;;) {
    while (first_ == nullptr) {
      if (stopping_) return;
      ++sleepers_;
      const std::uint32_t seen = wakeups_.load(std::memory_order_relaxed);
      lock.unlock();
      futex(wakeups_, FUTEX_WAIT, seen);
      lock.lock();
      --sleepers_;
    }
    CopyJob& job = *first_;
    ++job.active_threads_;
    lock.unlock();
    beat.job_begins();
    const CopyOutcome outcome = job.work(trial_);
    lock.lock();
    if (outcome.status != CopyStatus::ok && job.outcome_.status == CopyStatus::ok) {
      job.outcome_ = outcome;
    }
    // The first thread that comes back takes the job off the queue: no chunk is left. It is still
    // first there, because a later job is only entered after that.
    if (job.queued_) {
      first_ = job.next_;
      if (first_ == nullptr) last_ = nullptr;
      job.queued_ = false;
    }
    if (--job.active_threads_ > 0) {
      beat.job_ends();
      continue;
    }
    const CopyOutcome final_outcome = job.outcome_;
    const CopyJob::Done done = job.done_;
    void* const done_context = job.done_context_;
    lock.unlock();
    done(done_context, final_outcome);
    beat.job_ends();
    lock.lock();
  }
}

}  // namespace refit
