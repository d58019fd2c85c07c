// A fixed pool of threads that copies jobs: many contiguous or strided copies between mapped
// ranges, cut into chunks that the threads take in turn.
//
// submit() is called by any thread and never blocks on a copy; CopyJob::done runs on a pool thread.
// Knows pointers only: no regions, no plans, no sessions. Client memory that faults ends the job
// with CopyStatus::faulted, nothing else.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "memory/cast.hpp"
#include "memory/kernel_trial.hpp"
#include "posix/heartbeat.hpp"
#include "refit/result.hpp"

namespace refit {

/// `run_bytes` contiguous bytes of the target, repeated over up to `kDimsMax` loops, outermost
/// first. A contiguous copy has no loops. Source and target must not overlap, nor may the targets
/// of one job. With a cast every run is whole elements, and a run of the source has
/// source_run_bytes().
struct CopyOp {
  static constexpr std::size_t kDimsMax = 8;
  struct Loop {
    std::uint64_t count = 1;
    std::uint64_t source_stride_bytes = 0;
    std::uint64_t target_stride_bytes = 0;
  };
  const std::byte* source = nullptr;
  std::byte* target = nullptr;
  std::uint64_t run_bytes = 0;
  std::uint32_t loop_count = 0;
  Cast cast = Cast::none;
  std::array<Loop, kDimsMax> loops{};

  [[nodiscard]] std::uint64_t source_run_bytes() const noexcept {
    return source_bytes_of(cast, run_bytes);
  }
  [[nodiscard]] std::uint64_t run_count() const noexcept {
    std::uint64_t runs = 1;
    for (std::uint32_t i = 0; i < loop_count; ++i) runs *= loops[i].count;
    return runs;
  }
  struct Ends {
    const std::byte* source;
    std::byte* target;
  };
  /// Where turn `turn` of the outermost `outer` loops, counted as one, begins.
  [[nodiscard]] Ends ends_of(std::uint64_t turn, std::uint32_t outer) const noexcept {
    Ends ends{source, target};
    for (std::uint32_t i = outer; i-- > 0;) {
      const std::uint64_t index = turn % loops[i].count;
      turn /= loops[i].count;
      ends.source += index * loops[i].source_stride_bytes;
      ends.target += index * loops[i].target_stride_bytes;
    }
    return ends;
  }
  /// Of the target.
  [[nodiscard]] std::uint64_t bytes() const noexcept { return run_bytes * run_count(); }
};

enum class CopyStatus : std::uint8_t {
  ok = 0,
  faulted = 1,  ///< SIGBUS in the op's source or target; what was copied before stays copied
};

struct CopyOutcome {
  CopyStatus status = CopyStatus::ok;
  std::uint32_t op = 0;  ///< where faulted: the index of the first op that was found to
};

/// Copies on the calling thread, fenced; for jobs that are shorter than waking a thread. Allocates
/// nothing.
[[nodiscard]] CopyOutcome copy_inline(const CopyOp* ops, std::size_t count) noexcept;

/// One job and the table of its chunks. The owner prepares it once and may submit it again after
/// every `done`; it outlives its run, as do the ops it points to.
class CopyJob {
 public:
  /// On a pool thread, exactly once per submit, after the last byte is written and fenced. The pool
  /// has let go of the job: it may be submitted again or destroyed from here. It must neither throw
  /// nor destroy the pool.
  using Done = void (*)(void* context, CopyOutcome outcome);

  static constexpr std::uint64_t kChunkBytes = 1U << 20;

  CopyJob() = default;
  CopyJob(const CopyJob&) = delete;
  CopyJob& operator=(const CopyJob&) = delete;

  /// Cuts `count` ops into chunks of about `chunk_bytes`: large ops are split at page boundaries of
  /// the target, small ones share a chunk. Allocates; never while the job is in flight. `ops` is
  /// read again by every run.
  void prepare(const CopyOp* ops, std::size_t count, std::uint64_t chunk_bytes = kChunkBytes);

  void on_done(Done done, void* context) noexcept {
    done_ = done;
    done_context_ = context;
  }

  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] std::size_t chunk_count() const noexcept { return chunks_.size(); }

 private:
  friend class CopyPool;

  // Target bytes [position, position + bytes) of the ops from `op` on, counted from the start of
  // that op, run by run.
  struct Chunk {
    std::uint32_t op;
    std::uint64_t position;
    std::uint64_t bytes;
  };

  // Takes chunks until none is left or this thread faults.
  [[nodiscard]] CopyOutcome work(KernelTrial& trial) noexcept;

  const CopyOp* ops_ = nullptr;
  std::vector<Chunk> chunks_;
  std::uint64_t bytes_ = 0;
  bool casts_ = false;  // its chunks say nothing about how fast the copy kernels are
  Done done_ = nullptr;
  void* done_context_ = nullptr;

  // On a line of its own: every thread adds to it, while it reads the fields above.
  alignas(64) std::atomic<std::size_t> next_chunk_{0};

  // Guarded by the pool's mutex.
  alignas(64) CopyJob* next_ = nullptr;
  bool queued_ = false;
  unsigned active_threads_ = 0;
  CopyOutcome outcome_;
};

class CopyPool {
 public:
  /// Starts `threads` threads named refit-copy-N; 0 means one for each CPU of the process's
  /// affinity mask. Each is pinned to another CPU of the mask, as far as there are CPUs and the
  /// kernel allows it.
  [[nodiscard]] static Result<std::unique_ptr<CopyPool>> create(unsigned threads = 0);

  /// Finishes what was submitted, then joins. Not from `done`.
  ~CopyPool();
  CopyPool(const CopyPool&) = delete;
  CopyPool& operator=(const CopyPool&) = delete;

  /// Starts a job and returns. Jobs start in the order of submission and use every thread that is
  /// free; a job's `done` may come before that of an earlier one whose last chunk takes longer.
  /// Allocates nothing; at most one system call.
  void submit(CopyJob& job) noexcept;

  /// The name of the kernel that long runs are copied with: the best guess until enough was copied
  /// to know.
  [[nodiscard]] const char* kernel_name() const noexcept { return trial_.chosen().name; }

  [[nodiscard]] unsigned thread_count() const noexcept {
    return static_cast<unsigned>(threads_.size());
  }
  /// Threads that run on a CPU of their own.
  [[nodiscard]] unsigned pinned_count() const noexcept { return pinned_count_; }
  /// errno of the first pinning that failed (EPERM in a sandbox, EINVAL when the mask shrank); 0 if
  /// none.
  [[nodiscard]] int pin_error() const noexcept { return pin_error_; }
  /// How far thread `index` is, for whoever watches that it gets on.
  [[nodiscard]] WorkerReading read_worker(unsigned index) noexcept {
    return beats_[index].read(threads_[index].native_handle());
  }

 private:
  CopyPool() = default;
  Result<void> start(unsigned threads);
  void serve(Heartbeat& beat) noexcept;

  std::mutex mutex_;
  CopyJob* first_ = nullptr;  // the only job that threads may enter; the rest follow by next_
  CopyJob* last_ = nullptr;
  unsigned sleepers_ = 0;
  bool stopping_ = false;
  // The futex word that idle threads sleep on. Changed under the mutex; read by the kernel outside
  // it.
  std::atomic<std::uint32_t> wakeups_{0};

  KernelTrial trial_;

  std::unique_ptr<Heartbeat[]> beats_;  // one for each thread
  std::vector<std::thread> threads_;
  unsigned pinned_count_ = 0;
  int pin_error_ = 0;
};

}  // namespace refit
