// Writing jobs out for the driver, and the thread that queues and awaits them.
//
// Threads: whoever prepares, under prepare_mutex_, touches states_; the worker knows of it only
// the handles that stand in a job's batches. A job is the worker's from the moment it is taken off
// the queue until its `done` is called.
#include "memory/cuda/device_copier.hpp"

#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <string>
#include <system_error>
#include <utility>

#include "test_point.hpp"

namespace refit::cuda {
namespace {

using Clock = std::chrono::steady_clock;

std::int64_t now_ns() noexcept {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now().time_since_epoch())
      .count();
}

DeviceCopyOutcome failed(CUresult code, const char* call) noexcept {
  return {code, call, is_sticky(code), false};
}

DeviceCopyOutcome not_entered(const Error& error) noexcept {
  return failed(static_cast<CUresult>(error.native), "cuCtxPushCurrent");
}

std::string pair_text(CUdevice source, CUdevice target) {
  const auto name = [](CUdevice device) {
    return device == CopyEnd::kHost ? std::string("host") : "device " + std::to_string(device);
  };
  return name(source) + " to " + name(target);
}

/// `op` with as few runs as it has: loops that happen once are no loops, and innermost ones whose
/// runs touch are one run.
DeviceCopyOp merged(DeviceCopyOp op) noexcept {
  std::uint32_t kept = 0;
  for (std::uint32_t i = 0; i < op.loop_count; ++i) {
    if (op.loops[i].count != 1) op.loops[kept++] = op.loops[i];
  }
  op.loop_count = kept;
  while (op.loop_count > 0) {
    const CopyOp::Loop& inner = op.loops[op.loop_count - 1];
    std::uint64_t bytes = 0;
    if (inner.source_stride_bytes != source_bytes_of(op.cast, op.run_bytes) ||
        inner.target_stride_bytes != op.run_bytes ||
        __builtin_mul_overflow(op.run_bytes, inner.count, &bytes))
      break;
    op.run_bytes = bytes;
    --op.loop_count;
  }
  return op;
}

/// Copies `bytes` to device memory, where they are when it returns: cuMemcpyHtoD may return before,
/// and the stream of a launch does not wait for it. The context is current.
Result<void> upload(const std::shared_ptr<const Context>& context, CUdeviceptr target,
                    std::span<const std::byte> bytes, const std::string& purpose) {
  const Driver& driver = context->driver();
  REFIT_TRY_ASSIGN(const auto pinned, PinnedBuffer::allocate(context, bytes.size(), purpose));
  std::copy(bytes.begin(), bytes.end(), pinned->data());
  CUstream stream = nullptr;
  REFIT_TRY_CUDA(driver, stream_create(&stream, CU_STREAM_NON_BLOCKING),
                 purpose + ": a stream to upload its table (cuStreamCreate)");
  const CUresult asked = driver.memcpy_async(target, reinterpret_cast<CUdeviceptr>(pinned->data()),
                                             bytes.size(), stream);
  // Also where that failed: it may have been begun.
  const CUresult done = driver.stream_synchronize(stream);
  driver.stream_destroy(stream);
  if (asked != CUDA_SUCCESS)
    return fail_cuda(driver, purpose + ": uploading its table (cuMemcpyAsync)", asked);
  if (done != CUDA_SUCCESS)
    return fail_cuda(driver, purpose + ": uploading its table (cuStreamSynchronize)", done);
  return {};
}

}  // namespace

Error DeviceCopyOutcome::error() const {
  std::string what = "copying device memory (" + std::string(call) + ")";
  if (sticky) what += "; no more device copies until the daemon is started anew";
  const auto driver = Driver::get();
  if (!driver) return driver.error();
  return fail_cuda(**driver, what, code).value();
}

// ---- the job

void DeviceCopyJob::clear() noexcept {
  for (Batch& batch : batches_) {
    if (batch.end == nullptr) continue;
    const auto current = Current::enter(*batch.context);
    // Nothing waits for it any more; what the driver may say is about its state, not about ours.
    batch.context->driver().event_destroy(batch.end);
    if (batch.launch != nullptr && batch.launch->table.copies != 0)
      batch.context->driver().mem_free(batch.launch->table.copies);
  }
  batches_.clear();
  part_begins_.reset();
  part_count_ = 0;
  entry_count_ = 0;
  bytes_ = 0;
}

Result<void> DeviceCopyJob::prepare(DeviceCopier& copier, std::span<const DeviceCopyOp> ops) {
  REFIT_ASSERT(!in_flight_);
  clear();
  const std::lock_guard lock(copier.prepare_mutex_);
  const auto open_all = [&]() -> Result<void> {
    for (const DeviceCopyOp& op : ops) REFIT_TRY(append(copier, op));
    for (Batch& batch : batches_) {
      REFIT_TRY(copier.open(batch));
      REFIT_TRY(write_out(batch));
    }
    return {};
  };
  auto written = open_all();
  if (!written) clear();
  place({});
  return written;
}

Result<void> DeviceCopyJob::append(const DeviceCopier& copier, const DeviceCopyOp& wanted) {
  const DeviceCopyOp op = merged(wanted);
  REFIT_TRY(copier.check(op));
  std::uint64_t runs = op.run_bytes == 0 ? 0 : 1;
  const std::uint64_t room = kEntriesMax - entry_count_;
  // Divided rather than multiplied: counts come from shapes that a client chose.
  bool fits = true;
  for (std::uint32_t i = 0; i < op.loop_count; ++i) {
    const std::uint64_t count = op.loops[i].count;
    if (count == 0) return {};
    fits = fits && runs <= room / count;
    runs *= fits ? count : 1;
  }
  if (runs == 0) return {};
  if (op.cast != Cast::none || !fits || runs > room) return append_to_launch(op);
  Batch& batch = batch_between(op.source.device, op.target.device);
  for (std::uint64_t run = 0; run < runs; ++run) {
    CUdeviceptr source = op.source.address;
    CUdeviceptr target = op.target.address;
    std::uint64_t rest = run;
    for (std::uint32_t i = op.loop_count; i-- > 0;) {
      const CopyOp::Loop& loop = op.loops[i];
      source += rest % loop.count * loop.source_stride_bytes;
      target += rest % loop.count * loop.target_stride_bytes;
      rest /= loop.count;
    }
    if (op.part) {
      batch.part_runs.push_back({*op.part, source, target, op.run_bytes});
      continue;
    }
    batch.sources.push_back(source);
    batch.targets.push_back(target);
    batch.sizes.push_back(op.run_bytes);
  }
  entry_count_ += runs;
  bytes_ += runs * op.run_bytes;
  return {};
}

Result<void> DeviceCopyJob::append_to_launch(const DeviceCopyOp& op) {
  // So that no sum of units, tiles and blocks overflows, on whatever device.
  constexpr std::uint64_t kUnitsMax = std::uint64_t{1} << 48;
  const std::string pair = pair_text(op.source.device, op.target.device);
  StridedCopy copy{};
  copy.source = op.source.address;
  copy.target = op.target.address;
  copy.part = op.part.value_or(StridedCopy::kStays);
  copy.loop_count = op.loop_count;
  std::uint64_t runs = 1;
  bool fits = true;
  std::uint64_t multiples = op.source.address | op.target.address | op.run_bytes | 8;
  for (std::uint32_t i = 0; i < op.loop_count; ++i) {
    const CopyOp::Loop& loop = op.loops[i];
    copy.loops[i] = {loop.count, loop.source_stride_bytes, loop.target_stride_bytes};
    multiples |= loop.source_stride_bytes | loop.target_stride_bytes;
    fits = fits && !__builtin_mul_overflow(runs, loop.count, &runs);
  }
  const auto common = static_cast<std::uint32_t>(multiples & (~multiples + 1));
  const bool casts = op.cast != Cast::none;
  copy.source_unit_bytes = casts ? static_cast<std::uint32_t>(source_unit_bytes(op.cast)) : common;
  copy.target_unit_bytes = casts ? static_cast<std::uint32_t>(target_unit_bytes(op.cast)) : common;
  copy.run_units = op.run_bytes / copy.target_unit_bytes;
  const CUdevice device = op.target.is_host() ? op.source.device : op.target.device;
  Launch& launch = *launch_of(op.cast, device).launch;
  std::uint64_t units = 0;
  fits = fits && !__builtin_mul_overflow(runs, copy.run_units, &units) && units <= kUnitsMax &&
         units <= kUnitsMax - launch.table.units;
  if (!fits) return fail(Errc::unsupported, "copying " + pair + ": more bytes than any device has");
  if (launch.copies.empty()) {
    launch.purpose = casts ? "casting " + pair
                           : "copying " + pair + " in more than " + std::to_string(kEntriesMax) +
                                 " runs, which are a kernel's (same layouts need none)";
  }
  for (const CUdevice end : {op.source.device, op.target.device}) {
    if (end != CopyEnd::kHost && end != device) launch.reaches.push_back(end);
  }
  copy.first = launch.table.units;
  launch.table.units += units;
  launch.copies.push_back(copy);
  bytes_ += units * copy.target_unit_bytes;
  if (op.part) part_count_ = std::max<std::size_t>(part_count_, *op.part + std::size_t{1});
  return {};
}

/// What place() needs of an opened batch, and of a launch what the device needs.
Result<void> DeviceCopyJob::write_out(Batch& batch) {
  if (batch.launch == nullptr) {
    batch.staying = batch.sizes.size();
    const std::size_t all = batch.staying + batch.part_runs.size();
    batch.sources.resize(all);
    batch.targets.resize(all);
    batch.sizes.resize(all);
    return {};
  }
  Launch& launch = *batch.launch;
  const Driver& driver = batch.context->driver();
  const auto current = Current::enter(*batch.context);
  if (!current) return Unexpected(current.error());
  for (const StridedCopy& copy : launch.copies) {
    if (copy.part == StridedCopy::kStays) {
      ++batch.staying;
    } else {
      batch.part_runs.push_back({copy.part, 0, 0, 0});
    }
  }
  if (!batch.part_runs.empty() && part_begins_ == nullptr) {
    REFIT_TRY_ASSIGN(part_begins_,
                     PinnedBuffer::allocate(batch.context, part_count_ * sizeof(std::uint64_t),
                                            "where the layers of a plan begin"));
  }
  if (part_begins_ != nullptr)
    launch.table.part_begins = reinterpret_cast<std::uint64_t>(part_begins_->data());
  launch.table.count = launch.copies.size();
  const std::size_t bytes = launch.copies.size() * sizeof(StridedCopy);
  CUdeviceptr memory = 0;
  const CUresult allocated = driver.mem_alloc(&memory, bytes);
  launch.table.copies = memory;  // freed also where the driver says that there is none
  if (allocated != CUDA_SUCCESS)
    return fail_cuda(driver, launch.purpose + " (cuMemAlloc)", allocated);
  REFIT_TRY(upload(batch.context, memory, std::as_bytes(std::span(launch.copies)), launch.purpose));
  launch.copies = {};
  return {};
}

DeviceCopyJob::Batch& DeviceCopyJob::launch_of(Cast cast, CUdevice device) {
  for (Batch& batch : batches_) {
    if (batch.launch != nullptr && batch.launch->cast == cast && batch.target == device)
      return batch;
  }
  Batch& batch = batches_.emplace_back();
  batch.source = device;
  batch.target = device;
  batch.launch = std::make_unique<Launch>();
  batch.launch->cast = cast;
  return batch;
}

DeviceCopyJob::Batch& DeviceCopyJob::batch_between(CUdevice source, CUdevice target) {
  for (Batch& batch : batches_) {
    if (batch.launch == nullptr && batch.source == source && batch.target == target) return batch;
  }
  Batch& batch = batches_.emplace_back();
  batch.source = source;
  batch.target = target;
  return batch;
}

void DeviceCopyJob::place(std::span<std::byte* const> bases) noexcept {
  if (part_begins_ != nullptr) {
    auto* const begins = reinterpret_cast<std::uint64_t*>(part_begins_->data());
    for (std::size_t i = 0; i < part_count_; ++i)
      begins[i] = i < bases.size() ? reinterpret_cast<std::uint64_t>(bases[i]) : 0;
  }
  for (Batch& batch : batches_) {
    batch.count = batch.staying;
    for (const PartRun& run : batch.part_runs) {
      if (run.part >= bases.size() || bases[run.part] == nullptr) continue;
      if (batch.launch != nullptr) {
        ++batch.count;
        continue;
      }
      batch.sources[batch.count] = run.source;
      batch.targets[batch.count] =
          reinterpret_cast<CUdeviceptr>(bases[run.part]) + run.target_offset;
      batch.sizes[batch.count] = run.bytes;
      ++batch.count;
    }
  }
}

bool DeviceCopyJob::idle() const noexcept {
  return std::all_of(batches_.begin(), batches_.end(),
                     [](const Batch& batch) { return batch.count == 0; });
}

// ---- the copier: what jobs need of it

Result<std::unique_ptr<DeviceCopier>> DeviceCopier::create(
    std::shared_ptr<VisibleDevices> devices) {
  std::unique_ptr<DeviceCopier> copier(new DeviceCopier(std::move(devices)));
  REFIT_TRY(copier->start());
  return copier;
}

DeviceCopier::DeviceCopier(std::shared_ptr<VisibleDevices> devices)
    : devices_(std::move(devices)), driver_(devices_->driver()) {
  const std::size_t count = devices_->all().size();
  states_.resize(count);
  for (State& state : states_) state.peers.resize(count);
}

Result<void> DeviceCopier::start() {
  // Signals of the process are for its own threads; those that a fault raises must stay open.
  sigset_t blocked;
  sigfillset(&blocked);
  for (const int signal : {SIGBUS, SIGSEGV, SIGFPE, SIGILL, SIGTRAP, SIGABRT})
    sigdelset(&blocked, signal);
  sigset_t before;
  if (const int error = pthread_sigmask(SIG_SETMASK, &blocked, &before); error != 0)
    return fail_os("pthread_sigmask for the device copy thread", error);
  int thread_error = 0;
  try {
    thread_ = std::thread([this] { serve(); });
  } catch (const std::system_error& error) {
    thread_error = error.code().value();
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (thread_error != 0) return fail_os("starting the device copy thread", thread_error);
  pthread_setname_np(thread_.native_handle(), "refit-cuda");
  return {};
}

DeviceCopier::~DeviceCopier() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  submitted_.notify_one();
  if (thread_.joinable()) thread_.join();
  for (const State& state : states_) {
    if (state.context == nullptr) continue;
    const auto current = Current::enter(*state.context);
    for (CUstream stream : state.streams) {
      if (stream != nullptr) driver_.stream_destroy(stream);
    }
  }
}

Result<void> DeviceCopier::check(const DeviceCopyOp& op) const {
  if (op.source.is_host() && op.target.is_host())
    return fail(Errc::bad_argument, "a copy from host to host is not the device copier's");
  for (const CopyEnd& end : {op.source, op.target}) {
    if (!end.is_host() && devices_->find(end.device) == nullptr)
      return fail(Errc::bad_argument, "this process sees no device " + std::to_string(end.device));
  }
  return {};
}

/// The stream, and what else the driver must hold for the batch. Between devices it is the source's
/// stream: writes to a peer need no answer to go on, reads do.
Result<void> DeviceCopier::open(DeviceCopyJob::Batch& batch) {
  const bool from_host = batch.source == CopyEnd::kHost;
  const Direction direction = from_host                        ? host_to_device
                              : batch.target == CopyEnd::kHost ? device_to_host
                                                               : device_to_device;
  const std::string where = pair_text(batch.source, batch.target);
  REFIT_TRY_ASSIGN(State* const state, state_of(from_host ? batch.target : batch.source));
  batch.context = state->context;
  REFIT_TRY_ASSIGN(const auto current, Current::enter(*batch.context));
  if (direction == device_to_device && batch.source != batch.target) {
    REFIT_TRY_ASSIGN(const bool reachable, reach(*state, batch.target));
    batch.staged = !reachable;
  }
  if (batch.launch != nullptr) REFIT_TRY(open(*batch.launch, *state, batch.target));
  CUstream& stream = state->streams[direction];
  if (stream == nullptr) {
    REFIT_TRY_CUDA(driver_, stream_create(&stream, CU_STREAM_NON_BLOCKING),
                   "a stream for copies from " + where + " (cuStreamCreate)");
  }
  batch.stream = stream;
  REFIT_TRY_CUDA(driver_,
                 event_create(&batch.end, CU_EVENT_DISABLE_TIMING | CU_EVENT_BLOCKING_SYNC),
                 "an event for copies from " + where + " (cuEventCreate)");
  return {};
}

/// The kernel, and that it reaches what it reads and writes. The context is current.
Result<void> DeviceCopier::open(DeviceCopyJob::Launch& launch, State& state, CUdevice device) {
  for (const CUdevice other : launch.reaches) {
    REFIT_TRY_ASSIGN(const bool reachable, reach(state, other));
    if (reachable) continue;
    return fail(Errc::unsupported, launch.purpose + ": device " + std::to_string(device) +
                                       " cannot reach the memory of device " +
                                       std::to_string(other) +
                                       "; give both sides one dtype and layout, or one device");
  }
  if (!state.kernels) state.kernels = Kernels::load(state.context);
  if (!*state.kernels) {
    Error error = state.kernels->error();
    error.message = launch.purpose + ": " + error.message;
    if (error.native == CUDA_ERROR_OUT_OF_MEMORY) {
      state.kernels.reset();  // there may be room the next time
    } else if (error.code == Errc::cuda) {
      error.message += "; not tried again until the daemon is started anew";
    }
    return Unexpected(std::move(error));
  }
  launch.kernel = (**state.kernels)->of(launch.cast);
  return {};
}

std::size_t DeviceCopier::index_of(CUdevice ordinal) const noexcept {
  return static_cast<std::size_t>(devices_->find(ordinal) - devices_->all().data());
}

Result<DeviceCopier::State*> DeviceCopier::state_of(CUdevice ordinal) {
  State& state = states_[index_of(ordinal)];
  if (state.context == nullptr) {
    REFIT_TRY_ASSIGN(state.context, devices_->context(*devices_->find(ordinal)));
  }
  return &state;
}

/// Whether `from`, whose context is current, may write to the other directly; sees to it that it
/// can. Where not, the driver still copies between the two, through the host.
Result<bool> DeviceCopier::reach(State& from, CUdevice to) {
  Peer& peer = from.peers[index_of(to)];
  if (peer != Peer::unknown) return peer == Peer::reachable;
  const std::vector<CUdevice>& reaching = devices_->find(to)->peers;
  const CUdevice ordinal = from.context->device().ordinal;
  bool can = std::find(reaching.begin(), reaching.end(), ordinal) != reaching.end();
  if (can) {
    REFIT_TRY_ASSIGN(const State* const other, state_of(to));
    const CUresult code = driver_.ctx_enable_peer_access(other->context->handle(), 0);
    // Too many peers is a limit of the machine and no failure: the copies get slower.
    can = code != CUDA_ERROR_TOO_MANY_PEERS;
    if (can && code != CUDA_SUCCESS && code != CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED) {
      return fail_cuda(
          driver_, "peer access from " + pair_text(ordinal, to) + " (cuCtxEnablePeerAccess)", code);
    }
  }
  peer = can ? Peer::reachable : Peer::unreachable;
  return can;
}

// ---- the copier: submitting and serving

void DeviceCopier::submit(std::span<DeviceCopyJob* const> jobs) noexcept {
  {
    const std::lock_guard lock(mutex_);
    for (DeviceCopyJob* job : jobs) {
      REFIT_ASSERT(!job->in_flight_ && job->done_ != nullptr);
      job->in_flight_ = true;
      job->next_ = nullptr;
      (last_ != nullptr ? last_->next_ : first_) = job;
      last_ = job;
    }
  }
  submitted_.notify_one();
}

std::chrono::nanoseconds DeviceCopier::waiting() const noexcept {
  const std::int64_t since = waiting_since_ns_.load(std::memory_order_relaxed);
  return std::chrono::nanoseconds(since == 0 ? 0 : std::max<std::int64_t>(1, now_ns() - since));
}

void DeviceCopier::serve() noexcept {
  DeviceCopyJob* oldest = nullptr;  // of the jobs that the devices have been given
  DeviceCopyJob** end = &oldest;
  for (;;) {
    DeviceCopyJob* queued = nullptr;
    {
      std::unique_lock lock(mutex_);
      submitted_.wait(lock, [&] { return first_ != nullptr || oldest != nullptr || stopping_; });
      queued = std::exchange(first_, nullptr);
      last_ = nullptr;
    }
    if (queued == nullptr && oldest == nullptr) return;
    // All of them before one is waited for: one device copies while another does.
    if (queued != nullptr) beat_.job_begins();
    for (*end = queued; *end != nullptr; end = &(*end)->next_) launch(**end);
    if (queued != nullptr) beat_.job_ends();

    DeviceCopyJob& job = *oldest;
    waiting_since_ns_.store(now_ns(), std::memory_order_relaxed);
    finish(job);
    waiting_since_ns_.store(0, std::memory_order_relaxed);
    oldest = job.next_;
    if (oldest == nullptr) end = &oldest;
    beat_.job_begins();
    {
      const std::lock_guard lock(mutex_);
      job.in_flight_ = false;
    }
    job.done_(job.done_context_, job.outcome_);
    beat_.job_ends();
  }
}

void DeviceCopier::launch(DeviceCopyJob& job) noexcept {
  job.outcome_ = broken_;
  job.launched_ = 0;
  job.asked_ = false;
  for (DeviceCopyJob::Batch& batch : job.batches_) {
    if (!job.outcome_.ok()) break;
    ++job.launched_;
    if (batch.count != 0) job.outcome_ = launch(job, batch);
  }
  job.outcome_.untouched = !job.outcome_.ok() && !job.asked_;
}

DeviceCopyOutcome DeviceCopier::launch(DeviceCopyJob& job, DeviceCopyJob::Batch& batch) noexcept {
  const auto current = Current::enter(*batch.context);
  if (!current) return not_entered(current.error());
  const auto wait_for = [&](const auto& events, const char* name) {
    CUresult code = CUDA_SUCCESS;
    for (CUevent event : events) {
      if (event == nullptr || code != CUDA_SUCCESS || test_point(name)) continue;
      code = driver_.stream_wait_event(batch.stream, event, CU_EVENT_WAIT_DEFAULT);
    }
    return code;
  };
  CUresult code = wait_for(job.fences_.source, "fence.source");
  if (code == CUDA_SUCCESS) code = wait_for(job.fences_.engine, "fence.engine");
  if (code != CUDA_SUCCESS) return failed(code, "cuStreamWaitEvent");
  // A copy that is reported as failed may have been made.
  job.asked_ = true;
  if (batch.launch != nullptr) {
    const DeviceCopyJob::Launch& kernel = *batch.launch;
    code = Kernels::launch(driver_, kernel.kernel, kernel.table, batch.stream);
    if (code != CUDA_SUCCESS) return failed(code, "cuLaunchKernel");
  } else if (const DeviceCopyOutcome copied = copy(batch); !copied.ok()) {
    return copied;
  }
  code = driver_.event_record(batch.end, batch.stream);
  return code == CUDA_SUCCESS ? DeviceCopyOutcome{} : failed(code, "cuEventRecord");
}

/// One call whatever the number of copies: no limit on it is documented. The source is read in the
/// stream's order, that is behind the fences.
DeviceCopyOutcome DeviceCopier::copy(DeviceCopyJob::Batch& batch) noexcept {
  CUmemcpyAttributes attributes{};
  attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
  std::size_t first = 0;
  const std::size_t count = batch.count;
  // That a batch is staged through the host where there is no peer access is not documented; of
  // cuMemcpyAsync it is.
  if (!batch.staged && driver_.memcpy_batch_13000 != nullptr) {
    const CUresult code =
        driver_.memcpy_batch_13000(batch.targets.data(), batch.sources.data(), batch.sizes.data(),
                                   count, &attributes, &first, 1, batch.stream);
    return code == CUDA_SUCCESS ? DeviceCopyOutcome{} : failed(code, "cuMemcpyBatchAsync");
  }
  if (!batch.staged && driver_.memcpy_batch_12080 != nullptr) {
    std::size_t failed_index = 0;
    const CUresult code =
        driver_.memcpy_batch_12080(batch.targets.data(), batch.sources.data(), batch.sizes.data(),
                                   count, &attributes, &first, 1, &failed_index, batch.stream);
    return code == CUDA_SUCCESS ? DeviceCopyOutcome{} : failed(code, "cuMemcpyBatchAsync");
  }
  for (std::size_t i = 0; i < count; ++i) {
    const CUresult code =
        driver_.memcpy_async(batch.targets[i], batch.sources[i], batch.sizes[i], batch.stream);
    if (code != CUDA_SUCCESS) return failed(code, "cuMemcpyAsync");
  }
  return {};
}

/// Waits until the devices are done with the job. A job that failed may still have copies under
/// way, also those of the very call that failed; it ends when they have.
void DeviceCopier::finish(DeviceCopyJob& job) noexcept {
  const std::span<DeviceCopyJob::Batch> launched(job.batches_.data(), job.launched_);
  if (job.outcome_.ok()) {
    for (DeviceCopyJob::Batch& batch : launched) {
      if (batch.count == 0 || test_point("fence.done")) continue;
      const auto current = Current::enter(*batch.context);
      if (!current) {
        job.outcome_ = not_entered(current.error());
      } else if (const CUresult code = driver_.event_synchronize(batch.end); code != CUDA_SUCCESS) {
        job.outcome_ = failed(code, "cuEventSynchronize");
      }
      if (!job.outcome_.ok()) break;
    }
    if (job.outcome_.ok()) return;
  }
  for (DeviceCopyJob::Batch& batch : launched) {
    if (batch.count == 0) continue;
    const auto current = Current::enter(*batch.context);
    // A driver that does not answer even this leaves open whether the copies have ended.
    if (driver_.stream_synchronize(batch.stream) != CUDA_SUCCESS) job.outcome_.sticky = true;
  }
  if (job.outcome_.sticky && broken_.ok()) broken_ = job.outcome_;
}

}  // namespace refit::cuda
