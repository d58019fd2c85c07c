#include "unit/cuda/device_copier_scenarios.hpp"

#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>
#include <deque>
#include <new>
#include <random>

#include "memory/cuda/device_reader.hpp"
#include "memory/cuda/kernels/image.hpp"
#include "support/cast_by_definition.hpp"
#include "support/effort.hpp"
#include "support/eventually.hpp"
#include "unit/cuda/device_rig.hpp"

#ifndef REFIT_SANITIZED
// Allocations of this program's own code, libraries' not counted: the fake allocates as it likes. A
// sanitizer has its own operator new, so that its builds count none.
extern "C" {
extern char __executable_start;  // NOLINT(bugprone-reserved-identifier): the linker's name
extern char etext;
}
namespace {
std::atomic<bool> counting{false};
std::atomic<unsigned> allocations{0};
}  // namespace

[[gnu::noinline]] void* operator new(std::size_t bytes) {
  const auto* caller = static_cast<const char*>(__builtin_return_address(0));
  if (counting.load() && caller >= &__executable_start && caller < &etext) allocations.fetch_add(1);
  void* memory = std::malloc(bytes);
  if (memory == nullptr) std::abort();
  return memory;
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
#endif

namespace refit::cuda::test {
namespace {

DeviceCopyOp op_of(const CopyEnd& source, const CopyEnd& target, std::uint64_t bytes) {
  DeviceCopyOp op;
  op.source = source;
  op.target = target;
  op.run_bytes = bytes;
  return op;
}

void prepare(DeviceCopyJob& job, DeviceCopier& copier, const std::vector<DeviceCopyOp>& ops) {
  auto prepared = job.prepare(copier, ops);
  must(prepared.has_value(), prepared ? "" : prepared.error().to_string());
}

// ---- bytes and calls

/// Many small entries between all places but host and host, several runs of one job.
void pairs() {
  constexpr std::size_t kPlaces = 3;
  constexpr std::size_t kEntries = 2000;
  constexpr std::size_t kSliceBytes = kEntries * 64;
  const Rig rig;
  std::deque<Memory> sources;
  std::deque<Memory> targets;
  for (CUdevice place = CopyEnd::kHost; place < 2; ++place) {
    sources.emplace_back(rig, place, kSliceBytes);
    targets.emplace_back(rig, place, kPlaces * kSliceBytes);
  }
  std::mt19937 random(7);
  std::vector<DeviceCopyOp> ops;
  for (std::size_t from = 0; from < kPlaces; ++from) {
    for (std::size_t to = 0; to < kPlaces; ++to) {
      if (from == 0 && to == 0) continue;
      for (std::size_t i = 0; i < kEntries; ++i) {
        const std::uint64_t bytes = 1 + random() % 64;
        ops.push_back(op_of(sources[from].at(random() % (kSliceBytes - 64)),
                            targets[to].at(from * kSliceBytes + i * 64), bytes));
      }
    }
  }
  std::shuffle(ops.begin(), ops.end(), random);

  const auto sut = rig.copier();
  DeviceCopyJob job;
  prepare(job, *sut, ops);
  EXPECT_EQ(job.batch_count(), 8U);
  EXPECT_EQ(job.entry_count(), 8 * kEntries);
  EXPECT_EQ(rig.fake.gauge("streams"), 6U);
  EXPECT_EQ(rig.fake.gauge("events"), 8U);
  const bool peers = std::getenv("FAKECUDA_DEVICE_1") == nullptr;
  {
    DeviceCopyJob other;
    prepare(other, *sut, ops);
    EXPECT_EQ(rig.fake.gauge("streams"), 6U);
    EXPECT_EQ(rig.fake.calls("cuCtxEnablePeerAccess"), peers ? 2U : 0U);
  }
  const unsigned batches = rig.driver.version() < 12080 ? 0 : peers ? 8 : 6;
  for (unsigned run = 0; run < 3; ++run) {
    std::vector<Buffer> bytes;
    std::vector<Buffer> expected;
    for (std::size_t place = 0; place < kPlaces; ++place) {
      bytes.push_back(numbered(kSliceBytes, 10 * run + static_cast<unsigned>(place)));
      sources[place].set(bytes.back());
      expected.push_back(numbered(kPlaces * kSliceBytes, 100 + run));
      targets[place].set(expected.back());
    }
    for (const DeviceCopyOp& op : ops) {
      const auto from = static_cast<std::size_t>(op.source.device + 1);
      const auto to = static_cast<std::size_t>(op.target.device + 1);
      std::copy_n(bytes[from].begin() +
                      static_cast<std::ptrdiff_t>(op.source.address - sources[from].end.address),
                  op.run_bytes,
                  expected[to].begin() +
                      static_cast<std::ptrdiff_t>(op.target.address - targets[to].end.address));
    }
    const auto calls = [&](const char* name) { return rig.fake.calls(name); };
    const std::uint64_t all = calls(nullptr);
    const std::uint64_t batch = calls("cuMemcpyBatchAsync");
    const std::uint64_t second_abi = calls("cuMemcpyBatchAsync_v2");
    const std::uint64_t single = calls("cuMemcpyAsync");
    const DeviceCopyOutcome outcome = test::run(*sut, job);
    EXPECT_TRUE(outcome.ok()) << outcome.error().to_string();
    EXPECT_EQ(calls("cuMemcpyBatchAsync") - batch, batches);
    EXPECT_EQ(calls("cuMemcpyBatchAsync_v2") - second_abi,
              rig.driver.version() >= 13000 ? batches : 0);
    EXPECT_EQ(calls("cuMemcpyAsync") - single, (8 - batches) * kEntries);
    // Each batch: its context made current and given up twice, its end recorded and awaited.
    EXPECT_EQ(calls(nullptr) - all, 8 * 6 + batches + (8 - batches) * kEntries);
    EXPECT_EQ(rig.fake.gauge("pending_operations"), 0U);
    for (std::size_t place = 0; place < kPlaces; ++place)
      EXPECT_EQ(targets[place].get(), expected[place]) << "place " << place;
  }
}

/// A transposed 3-d tensor, an expanded one, and loops that are none.
void strides() {
  const Rig rig;
  Memory source(rig, 0, 4096);
  Memory target(rig, 1, 4096);
  const Buffer bytes = numbered(4096, 1);
  source.set(bytes);
  target.set(Buffer(4096));
  Buffer expected(4096);
  std::vector<DeviceCopyOp> ops;

  DeviceCopyOp transposed = op_of(source.at(16), target.at(0), 4);
  transposed.loop_count = 3;
  transposed.loops[0] = {3, 4, 160};
  transposed.loops[1] = {5, 12, 4};
  transposed.loops[2] = {7, 60, 20};
  ops.push_back(transposed);
  DeviceCopyOp expanded = op_of(source.at(5), target.at(1000), 3);
  expanded.loop_count = 1;
  expanded.loops[0] = {11, 0, 8};
  ops.push_back(expanded);
  DeviceCopyOp contiguous = op_of(source.at(2000), target.at(2000), 2);
  contiguous.loop_count = 4;
  contiguous.loops[0] = {2, 120, 120};
  contiguous.loops[1] = {1, 7, 9};
  contiguous.loops[2] = {10, 12, 12};
  contiguous.loops[3] = {6, 2, 2};
  ops.push_back(contiguous);
  DeviceCopyOp spread = op_of(source.at(3000), target.at(3000), 2);
  spread.loop_count = 1;
  spread.loops[0] = {6, 2, 4};
  ops.push_back(spread);
  DeviceCopyOp gathered = op_of(source.at(3100), target.at(3100), 2);
  gathered.loop_count = 1;
  gathered.loops[0] = {6, 4, 2};
  ops.push_back(gathered);
  for (const DeviceCopyOp& op : ops) {
    const auto visit = [&](auto&& self, std::uint32_t loop, std::uint64_t from,
                           std::uint64_t to) -> void {
      if (loop == op.loop_count) {
        for (std::uint64_t i = 0; i < op.run_bytes; ++i) expected[to + i] = bytes[from + i];
        return;
      }
      for (std::uint64_t i = 0; i < op.loops[loop].count; ++i)
        self(self, loop + 1, from + i * op.loops[loop].source_stride_bytes,
             to + i * op.loops[loop].target_stride_bytes);
    };
    visit(visit, 0, op.source.address - source.end.address, op.target.address - target.end.address);
  }
  const auto sut = rig.copier();
  DeviceCopyJob job;
  prepare(job, *sut, ops);
  EXPECT_EQ(job.entry_count(), 3U * 5 * 7 + 11 + 1 + 6 + 6);
  EXPECT_EQ(job.batch_count(), 1U);
  EXPECT_EQ(job.bytes(), 3U * 5 * 7 * 4 + 11 * 3 + 240 + 12 + 12);
  EXPECT_TRUE(test::run(*sut, job).ok());
  EXPECT_EQ(target.get(), expected);
}

/// Two parts and what stays: moved, left out, and back, with one call for each pair that has
/// something to copy and none for one that has not.
void parts() {
  const Rig rig;
  Memory source(rig, 0, 64);
  Memory host(rig, CopyEnd::kHost, 64);
  Memory target(rig, 0, 512);
  const Buffer bytes = numbered(64, 1);
  source.set(bytes);
  host.set(bytes);
  Buffer expected(512);
  target.set(expected);
  const auto sut = rig.copier();
  DeviceCopyJob job;
  const auto in_part = [](DeviceCopyOp op, std::uint32_t part) {
    op.part = part;
    return op;
  };
  // Of the host's nothing stays.
  prepare(
      job, *sut,
      {in_part(op_of(source.at(0), {0, 0}, 16), 0), op_of(source.at(16), target.at(496), 16),
       in_part(op_of(source.at(32), {32, 0}, 16), 2), in_part(op_of(host.at(48), {64, 0}, 16), 2)});
  EXPECT_EQ(job.batch_count(), 2U);
  EXPECT_EQ(job.entry_count(), 4U);
  constexpr std::size_t kOut = 511;
  const auto expect_run = [&](std::size_t first, std::size_t third, std::uint64_t batches) {
    const auto begin = [&](std::size_t at) {
      return at == kOut ? nullptr : reinterpret_cast<std::byte*>(target.end.address + at);
    };
    const std::array<std::byte*, 3> bases{begin(first), begin(kOut), begin(third)};
    job.place(bases);
    const std::uint64_t calls = rig.fake.calls(nullptr);
    const std::uint64_t batch_calls = rig.fake.calls("cuMemcpyBatchAsync");
    EXPECT_TRUE(test::run(*sut, job).ok());
    EXPECT_EQ(rig.fake.calls("cuMemcpyBatchAsync") - batch_calls, batches);
    EXPECT_EQ(rig.fake.calls(nullptr) - calls, 7 * batches);
    const auto expect_bytes = [&](std::size_t from, std::size_t to) {
      std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(from), 16,
                  expected.begin() + static_cast<std::ptrdiff_t>(to));
    };
    expect_bytes(16, 496);
    if (first != kOut) expect_bytes(0, first);
    if (third != kOut) {
      expect_bytes(32, third + 32);
      expect_bytes(48, third + 64);
    }
    EXPECT_EQ(target.get(), expected) << first << ", " << third;
    target.set(Buffer(512));
    expected = Buffer(512);
  };
  EXPECT_FALSE(job.idle()) << "one copy stays";
  expect_run(kOut, kOut, 1);
  expect_run(256, 64, 2);
  expect_run(128, kOut, 1);
  expect_run(kOut, 256, 2);
  expect_run(64, 128, 2);
  job.place({});
  expect_run(kOut, kOut, 1);

  prepare(job, *sut, {in_part(op_of(source.at(0), {0, 0}, 16), 0)});
  EXPECT_TRUE(job.idle()) << "no part is placed";
  const std::uint64_t calls = rig.fake.calls(nullptr);
  EXPECT_TRUE(test::run(*sut, job).ok());
  EXPECT_EQ(rig.fake.calls(nullptr), calls);
}

/// Casts between all places but host and host, with parts that move: one launch for each cast and
/// device, right bytes, and no other call than a batch makes.
void launches() {
  if (kernel_image().empty()) return;
  constexpr std::size_t kUnits = 5000;
  const Rig rig;
  std::deque<Memory> sources;
  std::deque<Memory> targets;
  for (CUdevice place = CopyEnd::kHost; place < 2; ++place) {
    sources.emplace_back(rig, place, 4 * kUnits);
    targets.emplace_back(rig, place, std::size_t{1} << 18);
  }
  std::vector<DeviceCopyOp> ops;
  constexpr std::size_t kSlotBytes = 4 * kUnits + 40;
  for (std::size_t from = 0; from < 3; ++from) {
    for (std::size_t to = 0; to < 3; ++to) {
      if (from == 0 && to == 0) continue;
      for (const Cast cast : {Cast::float32_to_bfloat16, Cast::float16_to_float32}) {
        const std::size_t slot = 2 * from + (cast == Cast::float16_to_float32 ? 1 : 0);
        DeviceCopyOp op = op_of(sources[from].at(0), targets[to].at(slot * kSlotBytes),
                                (kUnits / 2 - 1) * target_unit_bytes(cast));
        op.cast = cast;
        if (to == 1) {
          op.part = static_cast<std::uint32_t>(from);
          op.target.address = slot % 2 * kSlotBytes;
        }
        ops.push_back(op);
      }
    }
  }
  const auto sut = rig.copier();
  DeviceCopyJob job;
  prepare(job, *sut, ops);
  // What a device sends to the host is cast there.
  EXPECT_EQ(job.batch_count(), 4U);
  EXPECT_EQ(job.entry_count(), 0U);
  EXPECT_EQ(rig.fake.gauge("modules"), 2U);
  std::vector<Buffer> expected;
  std::vector<Buffer> bytes;
  for (std::size_t place = 0; place < 3; ++place) {
    bytes.push_back(numbered(4 * kUnits, static_cast<unsigned>(place)));
    sources[place].set(bytes.back());
    expected.emplace_back(std::size_t{1} << 18);
    targets[place].set(expected.back());
  }
  for (const unsigned absent : {0U, 1U, 3U}) {
    std::array<std::byte*, 3> bases{};
    for (std::size_t part = 0; part < bases.size(); ++part) {
      if (part == absent) continue;
      bases[part] = reinterpret_cast<std::byte*>(targets[1].end.address +
                                                 2 * kSlotBytes * ((part + absent) % 3) + absent);
    }
    job.place(bases);
    for (const DeviceCopyOp& op : ops) {
      const auto from = static_cast<std::size_t>(op.source.device + 1);
      const auto to = static_cast<std::size_t>(op.target.device + 1);
      std::uint64_t at = op.target.address;
      if (op.part) {
        if (bases[*op.part] == nullptr) continue;
        at += reinterpret_cast<std::uint64_t>(bases[*op.part]);
      }
      refit::test::cast_by_definition(op.cast, expected[to].data() + (at - targets[to].end.address),
                                      bytes[from].data(), op.run_bytes);
    }
    const std::uint64_t calls = rig.fake.calls(nullptr);
    const std::uint64_t launched = rig.fake.calls("cuLaunchKernel");
    const DeviceCopyOutcome outcome = test::run(*sut, job);
    EXPECT_TRUE(outcome.ok()) << outcome.error().to_string();
    EXPECT_EQ(rig.fake.calls("cuLaunchKernel") - launched, 4U);
    EXPECT_EQ(rig.fake.calls(nullptr) - calls, 4U * 7);
    for (std::size_t place = 0; place < 3; ++place)
      EXPECT_TRUE(targets[place].get() == expected[place]) << "place " << place << ", " << absent;
  }
}

/// Kernels that do not load are loaded once on each device, and every job that needs them is told
/// why; those that lacked memory are loaded again.
void kernels_once() {
  if (kernel_image().empty()) return;
  const Rig rig;
  const auto sut = rig.copier();
  DeviceCopyJob job;
  const auto cast_on = [](CUdevice device) {
    DeviceCopyOp op = op_of({4096, device}, {1 << 30, device}, 2);
    op.cast = Cast::float32_to_bfloat16;
    return op;
  };
  const auto refused = [&](CUdevice device, const char* code) {
    const auto result = job.prepare(*sut, std::vector{cast_on(device)});
    ASSERT_FALSE(result.has_value());
    for (const char* part : {"casting device", "cuModuleLoadData", code})
      EXPECT_NE(result.error().message.find(part), std::string::npos) << result.error().message;
  };
  const auto loads = [&] { return rig.fake.calls("cuModuleLoadData"); };
  must(rig.fake.set_faults("cuModuleLoadData=2") == 0, "the fault cannot be read");
  refused(0, "(2)");
  refused(0, "(2)");
  EXPECT_EQ(loads(), 2U);
  must(rig.fake.set_faults("cuModuleLoadData=209") == 0, "the fault cannot be read");
  for (int i = 0; i < 3; ++i) {
    refused(0, "(209)");
    prepare(job, *sut, {op_of({4096, 0}, {1 << 30, 0}, 2)});
  }
  EXPECT_EQ(loads(), 3U);
  rig.fake.set_faults("");
  refused(0, "(209)");
  prepare(job, *sut, {cast_on(1)});
  EXPECT_EQ(loads(), 4U);
}

void refusals() {
  const Rig rig;
  const auto sut = rig.copier();
  DeviceCopyJob job;
  const CopyEnd host{4096, CopyEnd::kHost};
  const CopyEnd first{4096, 0};
  const CopyEnd second{1 << 30, 1};
  const auto refused = [&](const std::vector<DeviceCopyOp>& ops, Errc code, const char* text) {
    const auto result = job.prepare(*sut, ops);
    EXPECT_FALSE(result.has_value()) << text;
    if (result) return;
    EXPECT_EQ(result.error().code, code);
    EXPECT_NE(result.error().message.find(text), std::string::npos) << result.error().message;
    EXPECT_EQ(job.batch_count(), 0U);
    EXPECT_EQ(job.bytes(), 0U);
  };
  const auto runs = [&](std::uint64_t outer, std::uint64_t inner) {
    DeviceCopyOp op = op_of(first, second, 2);
    op.loop_count = 2;
    op.loops[0] = {outer, 8 * inner, 4 * inner};
    op.loops[1] = {inner, 8, 4};
    return op;
  };
  refused({op_of(host, host, 8)}, Errc::bad_argument, "host to host");
  refused({op_of(first, {4096, 2}, 8)}, Errc::bad_argument, "no device 2");
  refused({op_of({4096, -2}, first, 8)}, Errc::bad_argument, "no device -2");
  constexpr std::uint64_t kMax = DeviceCopyJob::kEntriesMax;
  const char* const kTooMany = "device 0 to device 1: more bytes than";
  refused({runs(std::uint64_t{1} << 62, std::uint64_t{1} << 62)}, Errc::unsupported, kTooMany);
  refused({runs(3, std::uint64_t{1} << 63)}, Errc::unsupported, kTooMany);
  refused({runs(4, std::uint64_t{1} << 62)}, Errc::unsupported, kTooMany);
  refused({runs(1U << 24, (1U << 24) + 1)}, Errc::unsupported, kTooMany);
  DeviceCopyOp endless = op_of(first, second, 2);
  endless.loop_count = 1;
  endless.loops[0] = {std::uint64_t{1} << 63, 2, 2};
  refused({endless}, Errc::unsupported, kTooMany);
  prepare(job, *sut, {runs(1, kMax)});
  EXPECT_EQ(job.entry_count(), kMax);
  EXPECT_EQ(job.batch_count(), 1U);
  DeviceCopyOp cast = op_of(first, second, 2);
  cast.cast = Cast::float32_to_bfloat16;
  const std::vector<std::vector<DeviceCopyOp>> of_kernels{{runs(1, kMax + 1)},
                                                          {runs(1U << 11, 1U << 10)},
                                                          {op_of(first, second, 2), runs(1, kMax)},
                                                          {runs(1, kMax), op_of(first, second, 2)},
                                                          {cast}};
  for (const auto& ops : of_kernels) {
    if (kernel_image().empty()) {
      refused(ops, Errc::unsupported, "this build has no kernels");
      continue;
    }
    prepare(job, *sut, ops);
    EXPECT_LE(job.entry_count(), kMax);
    EXPECT_EQ(job.batch_count(), ops.size());
  }
  EXPECT_EQ(rig.fake.gauge("modules"), kernel_image().empty() ? 0U : 1U);

  // Nothing to copy: nothing is asked of the driver.
  DeviceCopyOp none = runs(std::uint64_t{1} << 40, 0);
  DeviceCopyOp never = runs(0, std::uint64_t{1} << 40);
  prepare(job, *sut, {op_of(first, second, 0), none, never});
  EXPECT_EQ(job.batch_count(), 0U);
  const std::uint64_t calls = rig.fake.calls(nullptr);
  EXPECT_TRUE(test::run(*sut, job).ok());
  EXPECT_EQ(rig.fake.calls(nullptr), calls);
}

#ifndef REFIT_SANITIZED
void allocations_of_a_run() {
  const Rig rig;
  Memory host(rig, CopyEnd::kHost, 1 << 16);
  Memory device(rig, 0, 1 << 16);
  const auto sut = rig.copier();
  DeviceCopyJob job;
  std::vector<DeviceCopyOp> ops;
  for (std::size_t i = 0; i < 1000; ++i)
    ops.push_back(op_of(host.at(i * 64), device.at(i * 64), 32));
  counting.store(true);
  prepare(job, *sut, ops);
  EXPECT_GT(allocations.exchange(0), 0U) << "nothing is counted";
  Completion completion(job);
  allocations.store(0);
  for (unsigned run = 1; run <= 5; ++run) {
    sut->submit(job);
    completion.wait_for(run);
  }
  EXPECT_EQ(allocations.load(), 0U);
  counting.store(false);
}
#endif

void several() {
  const Rig rig;
  Memory host(rig, CopyEnd::kHost, 4096);
  Memory first(rig, 0, 4096);
  Memory second(rig, 1, 4096);
  const auto sut = rig.copier();
  DeviceCopyJob jobs[2];
  prepare(jobs[0], *sut, {op_of(host.at(0), first.at(0), 4096)});
  prepare(jobs[1], *sut, {op_of(host.at(0), second.at(0), 4096)});
  static const Rig* the_rig = &rig;
  static std::atomic<std::uint64_t> queued_at_first_done{0};
  jobs[0].on_done(
      [](void*, DeviceCopyOutcome) {
        queued_at_first_done.store(the_rig->fake.calls("cuMemcpyBatchAsync"));
      },
      nullptr);
  Completion completion(jobs[1]);
  DeviceCopyJob* const both[] = {&jobs[0], &jobs[1]};
  sut->submit(both);
  EXPECT_TRUE(completion.wait_for(1).ok());
  EXPECT_EQ(queued_at_first_done.load(), 2U);
}

void end() {
  const Rig rig;
  Memory host(rig, CopyEnd::kHost, 4096);
  Memory device(rig, 0, 50 * 4096);
  auto sut = rig.copier();
  host.set(numbered(4096, 1));
  std::deque<DeviceCopyJob> jobs(50);
  std::deque<Completion> completions;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    prepare(jobs[i], *sut, {op_of(host.at(0), device.at(i * 4096), 4096)});
    completions.emplace_back(jobs[i]);
  }
  for (DeviceCopyJob& job : jobs) sut->submit(job);
  sut.reset();
  for (Completion& completion : completions) {
    EXPECT_EQ(completion.count(), 1U);
    EXPECT_TRUE(completion.wait_for(1).ok());
  }
  const Buffer bytes = device.get();
  const Buffer expected = numbered(4096, 1);
  for (std::size_t i = 0; i < jobs.size(); ++i)
    EXPECT_TRUE(std::equal(expected.begin(), expected.end(),
                           bytes.begin() + static_cast<std::ptrdiff_t>(i * 4096)));
}

/// `done` submits its own job, and in the end destroys it.
void from_done() {
  const Rig rig;
  Memory host(rig, CopyEnd::kHost, 4096);
  Memory device(rig, 0, 4096);
  const auto sut = rig.copier();
  struct Chain {
    DeviceCopier* copier;
    std::unique_ptr<DeviceCopyJob> job = std::make_unique<DeviceCopyJob>();
    unsigned left = 100;
    std::atomic<bool> ended{false};
  } chain{sut.get()};
  prepare(*chain.job, *sut, {op_of(host.at(0), device.at(0), 4096)});
  chain.job->on_done(
      [](void* context, DeviceCopyOutcome outcome) {
        auto& self = *static_cast<Chain*>(context);
        EXPECT_TRUE(outcome.ok());
        if (--self.left > 0) return self.copier->submit(*self.job);
        self.job.reset();
        self.ended.store(true);
      },
      &chain);
  sut->submit(*chain.job);
  EXPECT_TRUE(refit::test::eventually([&] { return chain.ended.load(); }));
  EXPECT_EQ(rig.fake.calls("cuMemcpyBatchAsync"), 100U);
}

// ---- a trainer that is stopped

constexpr const char* kHandleFd = "REFIT_TEST_HANDLE_FD";

/// Another process: records an interprocess event behind work that nobody made run yet.
void exporter() {
  const Rig rig;
  Memory memory(rig, 0, 4096);
  const Current current = rig.enter(0);
  CUstream stream = nullptr;
  CUevent event = nullptr;
  CUipcEventHandle handle{};
  must(rig.driver.stream_create(&stream, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS &&
           rig.driver.event_create(&event, CU_EVENT_INTERPROCESS | CU_EVENT_DISABLE_TIMING) ==
               CUDA_SUCCESS &&
           rig.memset_async(memory.end.address, 1, 4096, stream) == CUDA_SUCCESS &&
           rig.driver.event_record(event, stream) == CUDA_SUCCESS &&
           rig.driver.ipc_get_event_handle(&handle, event) == CUDA_SUCCESS,
       "the exporter's event");
  const int fd = std::atoi(std::getenv(kHandleFd));
  must(::write(fd, &handle, sizeof handle) == sizeof handle, "writing the handle");
  for (;;) ::pause();
}

void waiting() {
  int handles[2] = {-1, -1};
  must(::pipe(handles) == 0, "pipe");
  ::setenv(kHandleFd, std::to_string(handles[1]).c_str(), 1);
  const pid_t trainer = ::fork();
  if (trainer == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::execl("/proc/self/exe", "device_copier_scenario", "exporter", nullptr);
    ::_exit(127);
  }
  CUipcEventHandle handle{};
  must(::read(handles[0], &handle, sizeof handle) == sizeof handle, "reading the handle");
  ::kill(trainer, SIGSTOP);
  int status = 0;
  must(::waitpid(trainer, &status, WUNTRACED) == trainer && WIFSTOPPED(status), "stopping");
  {
    const Rig rig;
    Memory host(rig, CopyEnd::kHost, 4096);
    Memory device(rig, 0, 4096);
    const Current current = rig.enter(0);
    Fences fences;
    must(rig.driver.ipc_open_event_handle(&fences.source[3], handle) == CUDA_SUCCESS, "opening");
    const auto sut = rig.copier();
    DeviceCopyJob job;
    prepare(job, *sut, {op_of(host.at(0), device.at(0), 4096)});
    job.wait_for(fences);
    Completion completion(job);
    EXPECT_EQ(sut->waiting().count(), 0);
    sut->submit(job);
    EXPECT_TRUE(
        refit::test::eventually([&] { return sut->waiting() > std::chrono::milliseconds(20); }));
    EXPECT_FALSE(sut->read_worker().in_a_job());
    EXPECT_EQ(completion.count(), 0U);
    // On the NULL stream, which waits for every stream that does not opt out.
    Memory other(rig, 0, 64);
    other.set(Buffer(64));
    ::kill(trainer, SIGCONT);
    EXPECT_TRUE(completion.wait_for(1).ok());
    EXPECT_TRUE(refit::test::eventually([&] { return sut->waiting().count() == 0; }));
    rig.driver.event_destroy(fences.source[3]);
  }
  ::kill(trainer, SIGKILL);
  ::waitpid(trainer, &status, 0);
}

// ---- the reader

template <typename Take>
Result<void> read_all(DeviceReader& reader, CUdeviceptr address, std::uint64_t bytes, Take&& take) {
  REFIT_TRY(reader.begin(address, bytes));
  for (;;) {
    REFIT_TRY_ASSIGN(const auto chunk, reader.next());
    if (chunk.empty()) return {};
    take(chunk);
  }
}

void reader() {
  const Rig rig;
  Memory device(rig, 1, 5000);
  const Buffer expected = numbered(5000, 1);
  device.set(expected);
  for (const std::size_t buffer_bytes : {2U, 7U, 1000U, 4096U, 20000U}) {
    Memory buffer(rig, CopyEnd::kHost, buffer_bytes);
    const auto sut = must(DeviceReader::create(rig.contexts[1], buffer.host()));
    for (const std::size_t bytes : {0U, 1U, 2U, 3U, 499U, 500U, 501U, 1000U, 1001U, 4997U}) {
      if (bytes > 500 * buffer_bytes) continue;
      Buffer read;
      // What was begun before is given up.
      EXPECT_TRUE(sut->begin(device.end.address, std::min<std::uint64_t>(buffer_bytes, 5000)));
      const auto result = read_all(*sut, device.end.address + 3, bytes, [&](auto chunk) {
        EXPECT_LE(chunk.size(), buffer_bytes / 2);
        read.insert(read.end(), chunk.begin(), chunk.end());
      });
      EXPECT_TRUE(result.has_value()) << result.error().to_string();
      EXPECT_EQ(read, Buffer(expected.begin() + 3,
                             expected.begin() + 3 + static_cast<std::ptrdiff_t>(bytes)));
    }
  }
}

/// The next chunk is on its way while the reader's owner is at the one before.
void reader_ahead() {
  const Rig rig;
  Memory device(rig, 0, 4096);
  Memory buffer(rig, CopyEnd::kHost, 2048);
  const auto sut = must(DeviceReader::create(rig.contexts[0], buffer.host()));
  const auto copies = [&rig] { return rig.fake.calls("cuMemcpyAsync"); };
  const std::uint64_t before = copies();
  EXPECT_TRUE(sut->begin(device.end.address, 4096));
  EXPECT_EQ(copies(), before + 1);
  for (std::uint64_t chunk = 0; chunk < 4; ++chunk) {
    const auto bytes = sut->next();
    EXPECT_TRUE(bytes && bytes->size() == 1024);
    EXPECT_EQ(copies(), before + std::min<std::uint64_t>(chunk + 2, 4));
  }
  const auto end = sut->next();
  EXPECT_TRUE(end && end->empty());
}

// ---- waits

/// A trainer that still writes the source, an engine that still writes the target, and a job from
/// one to the other and to the host; then the reader.
bool fenced_copy_is_right() {
  constexpr std::size_t kBytes = 64 << 10;
  const Rig rig;
  Memory source(rig, 0, kBytes);
  Memory host_source(rig, CopyEnd::kHost, kBytes);
  Memory target(rig, 0, 2 * kBytes);
  Memory host_target(rig, CopyEnd::kHost, kBytes);
  Memory other_target(rig, 1, kBytes);
  Memory cast_target(rig, 0, kBytes / 2);
  Memory buffer(rig, CopyEnd::kHost, 1 << 12);
  source.set(Buffer(kBytes, std::byte{0x0a}));
  host_source.set(Buffer(kBytes, std::byte{0x77}));
  bool right = true;
  Party trainer(rig, 0);
  Party engine(rig, 1);
  trainer.fill(source.at(0), 0x77, kBytes);
  engine.fill(other_target.at(0), 0xee, kBytes);
  Party engine_on_first(rig, 0);
  engine_on_first.fill(target.at(0), 0xee, 2 * kBytes);

  const auto sut = rig.copier();
  DeviceCopyJob job;
  std::vector<DeviceCopyOp> ops{op_of(source.at(0), target.at(0), kBytes),
                                op_of(host_source.at(0), target.at(kBytes), kBytes),
                                op_of(source.at(0), host_target.at(0), kBytes),
                                op_of(source.at(0), other_target.at(0), kBytes)};
  Buffer cast(kBytes / 2);
  if (!kernel_image().empty()) {
    // The first of all, so that no other copy on its stream has waited before it.
    DeviceCopyOp op = op_of(source.at(0), cast_target.at(0), kBytes / 2);
    op.cast = Cast::float32_to_bfloat16;
    ops.insert(ops.begin(), op);
    const Buffer made(kBytes, std::byte{0x77});
    refit::test::cast_by_definition(op.cast, cast.data(), made.data(), cast.size());
  }
  cast_target.set(Buffer(kBytes / 2));
  prepare(job, *sut, ops);
  Fences fences;
  fences.source[0] = trainer.event;
  fences.engine[0] = engine.event;
  fences.engine[1] = engine_on_first.event;
  job.wait_for(fences);
  right = test::run(*sut, job).ok() && right;
  right = cast_target.get() == cast && right;
  right = host_target.get() == Buffer(kBytes, std::byte{0x77}) && right;
  right = other_target.get() == Buffer(kBytes, std::byte{0x77}) && right;
  right = target.get() == Buffer(2 * kBytes, std::byte{0x77}) && right;

  const auto reader = must(DeviceReader::create(rig.contexts[0], buffer.host()));
  const Buffer numbers = numbered(2 * kBytes, 5);
  target.set(numbers);
  Buffer read;
  right = read_all(*reader, target.end.address, 2 * kBytes,
                   [&](auto chunk) { read.insert(read.end(), chunk.begin(), chunk.end()); }) &&
          right;
  right = read == numbers && right;

  // One that is given up while the next chunk is copied: the buffer is its owner's again.
  right =
      reader->begin(target.end.address, 2 * kBytes) && reader->next() && reader->stop() && right;
  const Buffer own(1 << 12, std::byte{0x11});
  buffer.set(own);

  // What was not waited for runs now, and must not change anything.
  rig.finish_everything();
  right = buffer.get() == own && right;
  right = target.get() == numbers && right;
  right = other_target.get() == Buffer(kBytes, std::byte{0x77}) && right;
  return right;
}

void fences() {
  constexpr unsigned kSeeds = refit::test::rounds(20);
  unsigned wrong = 0;
  unsigned total = 0;
  for (const char* schedule : {"lazy", "eager", "mixed", "lazy,eager", "eager,lazy"}) {
    unsigned wrong_here = 0;
    for (unsigned seed = 0; seed < kSeeds; ++seed) {
      ::setenv("FAKECUDA_SCHEDULE", schedule, 1);
      ::setenv("FAKECUDA_SEED", std::to_string(seed).c_str(), 1);
      {
        const Rig loaded;
        loaded.fake.reload();
      }
      wrong_here += fenced_copy_is_right() ? 0U : 1U;
      ++total;
    }
    std::printf("%s: %u\n", schedule, wrong_here);
    wrong += wrong_here;
  }
  std::printf("wrong %u of %u\n", wrong, total);
}

// ---- failures

std::string text_of(const DeviceCopyOutcome& outcome) {
  return std::string(outcome.call) + " " + std::to_string(outcome.code) + " " +
         (outcome.sticky ? "sticky" : "");
}

/// A job over four streams, with a fault struck at one of its phases, and then once more.
void failure() {
  constexpr std::size_t kBytes = 8192;
  const std::string phase = std::getenv("FAULT_PHASE");
  const Rig rig;
  Memory host(rig, CopyEnd::kHost, kBytes);
  Memory first(rig, 0, kBytes);
  Memory copy(rig, 0, kBytes);
  Memory second(rig, 1, kBytes);
  Memory old(rig, 1, kBytes);
  Memory target(rig, CopyEnd::kHost, 2 * kBytes);
  Memory on_first(rig, 0, kBytes);
  Party trainer(rig, 0);
  Party engine(rig, 1);
  const std::vector<Memory*> targets{&on_first, &copy, &second};
  Memory cast_target(rig, 1, kBytes / 2);
  auto sut = rig.copier();
  DeviceCopyJob job;
  std::vector<DeviceCopyOp> ops{
      op_of(host.at(0), on_first.at(0), kBytes), op_of(first.at(0), copy.at(0), kBytes),
      op_of(first.at(0), second.at(0), kBytes), op_of(old.at(0), target.at(0), kBytes)};
  // The last of all, so that failures of the others come first.
  const bool casts = !kernel_image().empty();
  if (casts) {
    ops.push_back(op_of(old.at(0), cast_target.at(0), kBytes / 2));
    ops.back().cast = Cast::float32_to_float16;
  }
  const auto reset = [&](unsigned seed) {
    cast_target.set(Buffer(kBytes / 2));
    for (Memory* memory : {&host, &first, &old}) memory->set(numbered(kBytes, seed));
    for (Memory* memory : targets) memory->set(Buffer(kBytes));
    target.set(Buffer(2 * kBytes));
  };
  const auto is_right = [&](unsigned seed) {
    const Buffer expected = numbered(kBytes, seed);
    const Buffer got = target.get();
    Buffer cast(kBytes / 2);
    if (casts) {
      refit::test::cast_by_definition(Cast::float32_to_float16, cast.data(), expected.data(),
                                      cast.size());
    }
    return cast_target.get() == cast &&
           std::all_of(targets.begin(), targets.end(),
                       [&](const Memory* memory) { return memory->get() == expected; }) &&
           std::equal(expected.begin(), expected.end(), got.begin());
  };
  reset(1);
  trainer.fill(target.at(kBytes), 1, 1);
  engine.fill(target.at(kBytes + 1), 1, 1);
  Fences fences;
  fences.source[0] = trainer.event;
  fences.engine[0] = engine.event;
  job.wait_for(fences);

  const auto strike = [&] {
    must(rig.fake.set_faults(std::getenv("FAULT")) == 0, "the fault cannot be read");
  };
  if (phase == "prepared") {
    strike();
    const auto prepared = job.prepare(*sut, ops);
    std::printf("%s\n",
                prepared ? "prepared" : ("not prepared: " + prepared.error().to_string()).c_str());
    EXPECT_EQ(job.batch_count(), prepared ? ops.size() : 0U);
    rig.fake.set_faults("");
  }
  prepare(job, *sut, ops);
  if (phase == "read") {
    Memory buffer(rig, CopyEnd::kHost, 1024);
    const auto reading = must(DeviceReader::create(rig.contexts[0], buffer.host()));
    strike();
    const auto read = [&] {
      const auto result = read_all(*reading, first.end.address, kBytes, [](auto) {});
      return result ? std::string("ok") : result.error().to_string();
    };
    std::printf("read: %s\n", read().c_str());
    rig.fake.set_faults("");
    std::printf("again: %s\n", read().c_str());
    return;
  }
  if (phase == "run") strike();
  const DeviceCopyOutcome outcome = test::run(*sut, job);
  if (outcome.ok()) {
    std::printf("run: ok\n");
    EXPECT_TRUE(is_right(1));
  } else {
    std::printf("failed: %s\n", text_of(outcome).c_str());
    EXPECT_NE(outcome.error().message.find(outcome.call), std::string::npos);
    // Where it is not sticky nothing may still run.
    EXPECT_TRUE(outcome.sticky || rig.fake.calls("cuStreamSynchronize") > 0);
    rig.fake.set_faults("");
    std::printf("%s\n", outcome.untouched ? "untouched" : "touched");
    if (outcome.untouched && !outcome.sticky) {
      for (const Memory* memory : targets) EXPECT_EQ(memory->get(), Buffer(kBytes));
    }
  }
  if (outcome.sticky) {
    const std::uint64_t calls = rig.fake.calls(nullptr);
    const DeviceCopyOutcome again = test::run(*sut, job);
    const bool same = again.code == outcome.code && again.call == outcome.call && again.sticky;
    EXPECT_EQ(rig.fake.calls(nullptr), calls) << "the driver was asked again";
    std::printf("again: %s\n", same ? "the same" : text_of(again).c_str());
    rig.finish_everything();
    return;
  }
  reset(2);
  const DeviceCopyOutcome again = test::run(*sut, job);
  std::printf("again: %s\n", again.ok() && is_right(2) ? "ok" : text_of(again).c_str());
}

struct Scenario {
  std::string_view name;
  void (*run)();
};

constexpr Scenario kScenarios[] = {
    {"pairs", &pairs},
    {"strides", &strides},
    {"parts", &parts},
    {"launches", &launches},
    {"kernels_once", &kernels_once},
    {"refusals", &refusals},
    {"several", &several},
#ifndef REFIT_SANITIZED
    {"allocations", &allocations_of_a_run},
#endif

    {"end", &end},
    {"from_done", &from_done},
    {"exporter", &exporter},
    {"waiting", &waiting},
    {"reader", &reader},
    {"reader_ahead", &reader_ahead},
    {"fences", &fences},
    {"failure", &failure},
};

}  // namespace

int run_scenario(std::string_view name) {
  const auto driver = Driver::get();
  must(driver.has_value(), driver ? "" : driver.error().to_string());
  for (const Scenario& scenario : kScenarios) {
    if (scenario.name != name) continue;
    scenario.run();
    std::fflush(stdout);
    return ::testing::Test::HasFailure() ? 1 : 0;
  }
  must(false, "there is no such scenario");
  return 3;
}

}  // namespace refit::cuda::test
