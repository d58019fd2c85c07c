// Copies with device memory on at least one end: one thread that queues them on the daemon's own
// streams, waits until the devices have done them, and says so. The host's twin is copy_pool.hpp.
//
// submit() is called by any thread and never waits for a device; DeviceCopyJob::done runs on the
// thread refit-cuda. DeviceCopyJob::prepare() calls the driver on the thread that it is called on.
// Knows addresses and devices only: no regions, no plans, no sessions.
//
// Streams are non-blocking, one for each device and direction, shared by all jobs. A job waits for
// its fences on each of its streams, so an event that never completes holds up whoever needs the
// same stream after it, and there is no taking it back: only give events that were seen to pass.
#pragma once

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "memory/copy_pool.hpp"
#include "memory/cuda/device.hpp"
#include "memory/cuda/kernels.hpp"
#include "memory/cuda/pinned.hpp"
#include "posix/heartbeat.hpp"
#include "refit/result.hpp"

namespace refit::cuda {

class DeviceCopier;

/// One end of a copy.
struct CopyEnd {
  static constexpr CUdevice kHost = -1;

  CUdeviceptr address = 0;  ///< in this process; of host memory the pointer itself
  CUdevice device = kHost;  ///< its ordinal in this process; host memory is pinned in this process

  [[nodiscard]] bool is_host() const noexcept { return device == kHost; }
};

/// As CopyOp, with ends on devices. The copies of one job are in no order: its targets must overlap
/// neither each other nor any of its sources. A copy between devices runs on the source's stream,
/// so that a VMM mapping of the target must be writable from the source's device. A cast, and a
/// copy of too many runs, is a kernel's, on the target's device, or on the source's where the
/// target is on the host: that device must be able to reach both.
struct DeviceCopyOp {
  CopyEnd source;
  CopyEnd target;
  std::uint64_t run_bytes = 0;
  std::uint32_t loop_count = 0;
  std::array<CopyOp::Loop, CopyOp::kDimsMax> loops{};  ///< outermost first
  /// The moving buffer that the target is in, if any: its address then counts from that buffer's
  /// start, which is where DeviceCopyJob::place() says.
  std::optional<std::uint32_t> part{};
  Cast cast = Cast::none;  ///< every run is whole elements of it
};

/// What a job waits for on the devices, before its first byte. Null entries are left out.
struct Fences {
  static constexpr std::size_t kEventsMax = 8;
  std::array<CUevent, kEventsMax> source{};  ///< the trainer's: its bytes are written
  std::array<CUevent, kEventsMax> engine{};  ///< the engine's: its steps no longer use the target
};

struct DeviceCopyOutcome {
  CUresult code = CUDA_SUCCESS;
  const char* call = "";  ///< the driver's function that failed, or answered for an earlier one
  /// The copier takes nothing any more, every later job gets this same outcome, and only a new
  /// process can help: the context is dead, or the driver does not say whether the copies have
  /// ended, so that the targets may still change.
  bool sticky = false;
  /// It failed before the driver was asked for any of the job's copies: every target is as it was.
  bool untouched = false;

  [[nodiscard]] bool ok() const noexcept { return code == CUDA_SUCCESS; }
  /// In words; Errc::cuda. Allocates. Not for an outcome that is ok.
  [[nodiscard]] Error error() const;
};

/// One job: its copies sorted by stream and written out as the driver takes them. The owner
/// prepares it once and may submit it again after every `done`; it outlives its run. It may outlive
/// the copier.
class DeviceCopyJob {
 public:
  /// On the thread refit-cuda, exactly once per submit. Where the outcome is ok, every byte is
  /// there, for any reader on any device or CPU; where it is not and not sticky, none is being
  /// copied any more, and any of them may have been. The copier has let go of the job: it may be
  /// submitted again or destroyed from here. It must neither throw, nor block, nor destroy the
  /// copier.
  using Done = void (*)(void* context, DeviceCopyOutcome outcome);

  /// Runs of one job that the driver copies. Each costs 24 bytes here, 32 more if it is of a part,
  /// and a descriptor in the driver; strides that need more of them are a kernel's.
  static constexpr std::size_t kEntriesMax = std::size_t{1} << 20;

  DeviceCopyJob() = default;
  ~DeviceCopyJob() { clear(); }
  DeviceCopyJob(const DeviceCopyJob&) = delete;
  DeviceCopyJob& operator=(const DeviceCopyJob&) = delete;

  /// Writes `ops` out and opens the streams, events and peer accesses that they need; `ops` is not
  /// read again. Empty copies are left out. Any thread, one at a time per job, never while the job
  /// is in flight. Allocates, and blocks in the driver: for milliseconds where a device or a pair
  /// of them is new.
  ///
  /// Errors, after which the job is empty: Errc::unsupported for what needs a kernel where there
  /// are none (see Kernels::load()) and where it would not reach both ends, Errc::bad_argument for
  /// a device that this process does not see and for host to host, Errc::cuda.
  [[nodiscard]] Result<void> prepare(DeviceCopier& copier, std::span<const DeviceCopyOp> ops);

  void on_done(Done done, void* context) noexcept {
    done_ = done;
    done_context_ = context;
  }
  /// For every submit from now on. The events outlive the run.
  void wait_for(const Fences& fences) noexcept { fences_ = fences; }
  /// Where each part begins, on the same device as ever, for every submit from now on: its runs are
  /// written there. A part that is null here, or that is behind the last one, is left out; so are
  /// all of them before the first call. Not while the job is in flight. Allocates nothing.
  void place(std::span<std::byte* const> bases) noexcept;
  /// No run is asked for: a submit would call no driver.
  [[nodiscard]] bool idle() const noexcept;

  [[nodiscard]] std::uint64_t bytes() const noexcept { return bytes_; }
  [[nodiscard]] std::size_t entry_count() const noexcept { return entry_count_; }
  /// Batch calls per run, where the driver has them: one for each pair of source and target, and
  /// launches: one for each cast and device; fewer where all of their runs are left out.
  [[nodiscard]] std::size_t batch_count() const noexcept { return batches_.size(); }

 private:
  friend class DeviceCopier;

  // A run whose target is in a buffer that moves.
  struct PartRun {
    std::uint32_t part = 0;
    CUdeviceptr source = 0;
    std::uint64_t target_offset = 0;
    std::size_t bytes = 0;
  };

  // What a kernel does on one device: one launch over a table there.
  struct Launch {
    Cast cast = Cast::none;
    std::string purpose;            // in words, of the first of its copies
    std::vector<CUdevice> reaches;  // other devices
    std::vector<StridedCopy> copies;
    StridedCopyTable table{};
    CUfunction kernel = nullptr;
  };

  // All copies between one pair, in the arrays that the driver reads: first those that stay, then
  // those of the parts that are placed. Or a launch, of which both are the device that it runs on.
  struct Batch {
    CUdevice source = CopyEnd::kHost;
    CUdevice target = CopyEnd::kHost;
    bool staged = false;  // between devices that cannot reach each other
    std::shared_ptr<const Context> context;
    CUstream stream = nullptr;  // the copier's
    CUevent end = nullptr;      // recorded behind the copies; so one job's end is not another's
    std::vector<CUdeviceptr> targets;
    std::vector<CUdeviceptr> sources;
    std::vector<std::size_t> sizes;
    std::vector<PartRun> part_runs;
    std::unique_ptr<Launch> launch;
    std::size_t staying = 0;
    std::size_t count = 0;  // of the next run
  };

  [[nodiscard]] Result<void> append(const DeviceCopier& copier, const DeviceCopyOp& wanted);
  [[nodiscard]] Result<void> append_to_launch(const DeviceCopyOp& op);
  [[nodiscard]] Batch& batch_between(CUdevice source, CUdevice target);
  [[nodiscard]] Batch& launch_of(Cast cast, CUdevice device);
  [[nodiscard]] Result<void> write_out(Batch& batch);
  void clear() noexcept;

  std::vector<Batch> batches_;
  std::size_t entry_count_ = 0;
  std::uint64_t bytes_ = 0;
  /// Where parts begin, for kernels, which read it on the device; null where no kernel writes any.
  std::unique_ptr<PinnedBuffer> part_begins_;
  std::size_t part_count_ = 0;
  Fences fences_;
  Done done_ = nullptr;
  void* done_context_ = nullptr;

  DeviceCopyJob* next_ = nullptr;  // guarded by the copier's mutex while queued
  bool in_flight_ = false;         // guarded by the copier's mutex

  // The worker's.
  DeviceCopyOutcome outcome_;
  std::size_t launched_ = 0;  // batches that the driver was asked for, the one that failed included
  bool asked_ = false;        // for a copy
};

class DeviceCopier {
 public:
  /// Starts the thread. Contexts are taken from `devices` when a job first needs them.
  [[nodiscard]] static Result<std::unique_ptr<DeviceCopier>> create(
      std::shared_ptr<VisibleDevices> devices);

  /// Finishes what was submitted, then joins and gives the streams back: as long as the devices
  /// take. Not from `done`.
  ~DeviceCopier();
  DeviceCopier(const DeviceCopier&) = delete;
  DeviceCopier& operator=(const DeviceCopier&) = delete;

  /// Starts a job and returns. Allocates nothing, calls no driver; at most one system call.
  void submit(DeviceCopyJob& job) noexcept {
    DeviceCopyJob* one = &job;
    submit(std::span(&one, 1));
  }
  /// Starts several at once: all of them are queued on the devices before one is waited for. What
  /// is submitted during that wait is queued when it ends; `done` comes in the order of submission.
  void submit(std::span<DeviceCopyJob* const> jobs) noexcept;

  /// For the watchdog. In a job is only who calls the driver or `done`; that these return is the
  /// host's affair. Waiting for a device is not: it takes as long as the copies and the events
  /// before them take, it uses no CPU, and neither ends sooner if the daemon is started anew. See
  /// waiting(). A driver whose queue is full may wait within a call, too, and looks like a hang.
  [[nodiscard]] WorkerReading read_worker() noexcept { return beat_.read(thread_.native_handle()); }
  /// For how long the thread has been waiting for devices; 0 while it is not. For status and logs:
  /// only a person can tell a trainer that is slow from a device that is lost.
  [[nodiscard]] std::chrono::nanoseconds waiting() const noexcept;

 private:
  friend class DeviceCopyJob;
  enum Direction : std::size_t { host_to_device, device_to_host, device_to_device, kDirections };
  enum class Peer : std::uint8_t { unknown, reachable, unreachable };
  struct State {
    std::shared_ptr<const Context> context;  // null until a job needs it
    std::array<CUstream, kDirections> streams{};
    std::vector<Peer> peers;  // beside states_
    /// Nothing until a job needs them. Of a failure its error, because each load may take as long
    /// as the driver's compiler does, and the next would fail as well.
    std::optional<Result<std::unique_ptr<Kernels>>> kernels;
  };

  explicit DeviceCopier(std::shared_ptr<VisibleDevices> devices);
  [[nodiscard]] Result<void> start();

  // prepare(): any thread, under prepare_mutex_.
  [[nodiscard]] std::size_t index_of(CUdevice ordinal) const noexcept;
  [[nodiscard]] Result<State*> state_of(CUdevice ordinal);
  [[nodiscard]] Result<void> check(const DeviceCopyOp& op) const;
  [[nodiscard]] Result<void> open(DeviceCopyJob::Batch& batch);
  [[nodiscard]] Result<void> open(DeviceCopyJob::Launch& launch, State& state, CUdevice device);
  [[nodiscard]] Result<bool> reach(State& from, CUdevice to);

  // The worker alone.
  void serve() noexcept;
  void launch(DeviceCopyJob& job) noexcept;
  [[nodiscard]] DeviceCopyOutcome launch(DeviceCopyJob& job, DeviceCopyJob::Batch& batch) noexcept;
  [[nodiscard]] DeviceCopyOutcome copy(DeviceCopyJob::Batch& batch) noexcept;
  void finish(DeviceCopyJob& job) noexcept;

  const std::shared_ptr<VisibleDevices> devices_;
  const Driver& driver_;
  std::mutex prepare_mutex_;
  std::vector<State> states_;  // beside devices_->all()

  std::mutex mutex_;
  std::condition_variable submitted_;
  DeviceCopyJob* first_ = nullptr;
  DeviceCopyJob* last_ = nullptr;
  bool stopping_ = false;

  DeviceCopyOutcome broken_;  // the worker's; the sticky outcome that every later job gets
  std::atomic<std::int64_t> waiting_since_ns_{0};  // relaxed: nothing is published through it
  Heartbeat beat_;
  std::thread thread_;
};

}  // namespace refit::cuda
