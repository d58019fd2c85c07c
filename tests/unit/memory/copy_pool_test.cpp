// The copy pool: correct bytes for any op, jobs in any number, faults that stay the job's own.
//
// Method throughout: copy by the pool, and by a byte loop written from the definition of an op, and
// compare whole targets.
#include "memory/copy_pool.hpp"

#include <gtest/gtest.h>
#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <csignal>
#include <cstring>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "memory/sigbus_guard.hpp"
#include "support/cast_by_definition.hpp"
#include "unit/memory/cut_mapping.hpp"

namespace refit {
namespace {

using test::CutMapping;

// Counts completions and keeps the last outcome.
class Completion {
 public:
  static void done(void* context, CopyOutcome outcome) {
    auto& self = *static_cast<Completion*>(context);
    const std::lock_guard lock(self.mutex_);
    self.outcome_ = outcome;
    ++self.count_;
    self.changed_.notify_all();
  }
  CopyOutcome wait_for(unsigned count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return count_ >= count; });
    EXPECT_EQ(count_, count);
    return outcome_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned count_ = 0;
  CopyOutcome outcome_;
};

std::unique_ptr<CopyPool> pool_of(unsigned threads) {
  auto pool = CopyPool::create(threads);
  if (!pool) {
    ADD_FAILURE() << pool.error().to_string();
    std::abort();
  }
  return std::move(*pool);
}

using Buffer = std::vector<std::byte>;

Buffer numbered(std::size_t bytes, unsigned seed) {
  Buffer buffer(bytes);
  std::uint32_t state = seed * 2654435761U + 1;
  for (std::byte& byte : buffer) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<std::byte>(state >> 24);
  }
  return buffer;
}

// The definition: nested loops, byte by byte, relative to other bases.
void copy_by_definition(const CopyOp& op, std::uint32_t loop, const std::byte* source,
                        std::byte* target) {
  if (loop == op.loop_count) {
    test::cast_by_definition(op.cast, target, source, op.run_bytes);
    return;
  }
  for (std::uint64_t i = 0; i < op.loops[loop].count; ++i) {
    copy_by_definition(op, loop + 1, source + i * op.loops[loop].source_stride_bytes,
                       target + i * op.loops[loop].target_stride_bytes);
  }
}

CopyOp contiguous(const Buffer& source, std::size_t from, Buffer& target, std::size_t to,
                  std::size_t bytes) {
  EXPECT_LE(from + bytes, source.size());
  EXPECT_LE(to + bytes, target.size());
  CopyOp op;
  op.source = source.data() + from;
  op.target = target.data() + to;
  op.run_bytes = bytes;
  return op;
}

CopyOp strided(const Buffer& source, Buffer& target, std::size_t run_bytes,
               std::initializer_list<CopyOp::Loop> loops) {
  CopyOp op = contiguous(source, 0, target, 0, run_bytes);
  for (const CopyOp::Loop& loop : loops) op.loops[op.loop_count++] = loop;
  return op;
}

// Runs the ops by the pool with several chunk sizes, and inline; each time the whole target equals
// the definition's.
void expect_copies(CopyPool& sut, const std::vector<CopyOp>& ops, Buffer& target) {
  Buffer expected(target.size(), std::byte{0xEE});
  std::uint64_t bytes = 0;
  for (const CopyOp& op : ops) {
    copy_by_definition(op, 0, op.source, expected.data() + (op.target - target.data()));
    bytes += op.bytes();
  }
  for (const std::uint64_t chunk_bytes :
       {std::uint64_t{1}, std::uint64_t{4096}, std::uint64_t{100'001}, CopyJob::kChunkBytes}) {
    if (bytes / chunk_bytes > 100000) continue;
    std::fill(target.begin(), target.end(), std::byte{0xEE});
    CopyJob job;
    Completion completion;
    job.on_done(Completion::done, &completion);
    job.prepare(ops.data(), ops.size(), chunk_bytes);
    EXPECT_EQ(job.bytes(), bytes);
    sut.submit(job);
    EXPECT_EQ(completion.wait_for(1).status, CopyStatus::ok);
    ASSERT_TRUE(target == expected) << "chunk " << chunk_bytes;
  }
  std::fill(target.begin(), target.end(), std::byte{0xEE});
  EXPECT_EQ(copy_inline(ops.data(), ops.size()).status, CopyStatus::ok);
  ASSERT_TRUE(target == expected) << "inline";
}

TEST(CopyPool, ContiguousOpsOfManySizesAndAlignments) {
  const auto sut = pool_of(2);
  const std::size_t sizes[] = {0,    1,     2,     63,    64,    65,      4095,    4096,
                               4097, 16383, 16384, 16385, 65536, 1000003, 1 << 20, 3333333};
  const Buffer source = numbered(8 << 20, 1);
  Buffer target(8 << 20);
  std::vector<CopyOp> ops;
  std::size_t to = 3;
  std::size_t from = 17;
  for (const std::size_t bytes : sizes) {
    ops.push_back(contiguous(source, from, target, to, bytes));
    to += bytes + 5;
    from += bytes + 1;
  }
  expect_copies(*sut, ops, target);
}

TEST(CopyPool, ManySmallOpsShareChunks) {
  const auto sut = pool_of(2);
  const Buffer source = numbered(1 << 20, 2);
  Buffer target(1 << 20);
  std::vector<CopyOp> ops;
  for (std::size_t i = 0; i < 4000; ++i) {
    ops.push_back(contiguous(source, i * 100, target, (3999 - i) * 110, 64));
  }
  expect_copies(*sut, ops, target);
  CopyJob job;
  job.prepare(ops.data(), ops.size());
  EXPECT_LE(job.chunk_count(), 4U);
  EXPECT_GE(job.chunk_count(), 1U);
}

TEST(CopyPool, LargeOpIsSplitAtPagesOfTheTarget) {
  const Buffer source = numbered(5 << 20, 3);
  Buffer target(5 << 20);
  const CopyOp op = contiguous(source, 1, target, 7, (5 << 20) - 7);
  CopyJob job;
  job.prepare(&op, 1);
  EXPECT_GE(job.chunk_count(), 5U);
  EXPECT_LE(job.chunk_count(), 6U);
  const auto sut = pool_of(3);
  expect_copies(*sut, {op}, target);
}

TEST(CopyPool, StridedOps) {
  const auto sut = pool_of(2);
  const Buffer source = numbered(4 << 20, 4);
  Buffer target(1 << 20);
  // A slice of rows, into other rows.
  expect_copies(*sut, {strided(source, target, 300, {{500, 4096, 1000}})}, target);
  // Transposes of each element size.
  for (const std::size_t element : {1U, 2U, 3U, 4U, 8U, 16U}) {
    expect_copies(*sut,
                  {strided(source, target, element,
                           {{100, element, 200 * element}, {200, 100 * element, element}})},
                  target);
  }
  // Runs long enough to be cut inside.
  expect_copies(*sut, {strided(source, target, 200000, {{4, 300000, 250001}})}, target);
  // All eight loops, and loops of one and of none.
  expect_copies(*sut,
                {strided(source, target, 5,
                         {{2, 70000, 640},
                          {2, 30000, 320},
                          {2, 10000, 160},
                          {2, 4000, 80},
                          {2, 2000, 40},
                          {2, 900, 20},
                          {1, 1, 1},
                          {2, 100, 10}})},
                target);
  expect_copies(*sut, {strided(source, target, 64, {{3, 64, 64}, {0, 1, 1}})}, target);
}

// Goal: chunks begin and end between elements, whatever the address. Method: odd targets, chunks of
// odd sizes, runs that are cut inside, and single elements.
TEST(CopyPool, Casts) {
  const auto sut = pool_of(2);
  const Buffer source = numbered(2 << 20, 6);
  for (std::size_t cast = 1; cast < kCastCount; ++cast) {
    for (const std::size_t to : {0U, 7U}) {
      Buffer target(1 << 20);
      CopyOp one = contiguous(source, 5, target, to, 600'004);
      CopyOp rows = strided(source, target, 40'000, {{4, 100'000, 50'001}});
      CopyOp transposed = strided(source, target, 4, {{100, 8, 1600}, {200, 1600, 8}});
      for (CopyOp* op : {&one, &rows, &transposed}) op->cast = static_cast<Cast>(cast);
      transposed.run_bytes = target_unit_bytes(transposed.cast);
      expect_copies(*sut, {one}, target);
      expect_copies(*sut, {rows}, target);
      expect_copies(*sut, {transposed}, target);
    }
  }
}

TEST(CopyPool, RandomOpsEqualTheDefinition) {
  // Goal: mixtures of op kinds and chunk edges that nobody thought of. Method: fixed seeds,
  // disjoint target slots.
  const auto sut = pool_of(2);
  const Buffer source = numbered(1 << 20, 5);
  for (unsigned seed = 0; seed < 12; ++seed) {
    std::mt19937 random(seed);
    const auto below = [&](std::uint64_t limit) { return random() % limit; };
    Buffer target(1 << 20);
    std::vector<CopyOp> ops;
    for (std::size_t slot = 0; slot + 65536 <= target.size(); slot += 65536) {
      CopyOp op = contiguous(source, below(65536), target, slot + below(100), 1 + below(1000));
      if (below(4) == 0) op.run_bytes = 1 + below(60000);
      if (below(2) == 0) op.cast = static_cast<Cast>(below(kCastCount));
      op.run_bytes = (op.run_bytes + 1) / target_unit_bytes(op.cast) * target_unit_bytes(op.cast);
      if (op.run_bytes < 1000 && below(2) == 0) {
        const std::uint64_t count = 1 + below(60);
        op.loops[op.loop_count++] = {count, below(2000), op.run_bytes + below(20)};
      }
      if (op.run_bytes < 30 && below(2) == 0) {
        // An outer loop over what is there, past its extent in the target.
        const CopyOp::Loop inner = op.loop_count > 0 ? op.loops[0] : CopyOp::Loop{};
        op.loops[0] = {1 + below(10), below(5000), inner.count * (inner.target_stride_bytes + 30)};
        op.loops[op.loop_count++] = inner;
      }
      if (op.loop_count == 2 && op.loops[1].count == 1 && op.loops[1].target_stride_bytes == 0) {
        op.loop_count = 1;
      }
      ops.push_back(op);
    }
    std::shuffle(ops.begin(), ops.end(), random);
    expect_copies(*sut, ops, target);
  }
}

TEST(CopyPool, JobWithoutOpsIsDone) {
  const auto sut = pool_of(2);
  CopyJob job;
  Completion completion;
  job.on_done(Completion::done, &completion);
  for (unsigned round = 1; round <= 3; ++round) {
    job.prepare(nullptr, 0);
    sut->submit(job);
    EXPECT_EQ(completion.wait_for(round).status, CopyStatus::ok);
  }
  EXPECT_EQ(copy_inline(nullptr, 0).status, CopyStatus::ok);
}

TEST(CopyPool, OneJobManyTimesSeesTheNewBytesEachTime) {
  const auto sut = pool_of(2);
  Buffer source(300000);
  Buffer target(300000);
  const CopyOp op = contiguous(source, 0, target, 0, source.size());
  CopyJob job;
  Completion completion;
  job.on_done(Completion::done, &completion);
  job.prepare(&op, 1, 16384);
  for (unsigned round = 1; round <= 200; ++round) {
    std::fill(source.begin(), source.end(), static_cast<std::byte>(round));
    sut->submit(job);
    (void)completion.wait_for(round);
    ASSERT_TRUE(target == source) << round;
  }
}

TEST(CopyPool, QueueOfJobsFromTwoThreads) {
  const auto sut = pool_of(2);
  const Buffer source = numbered(64 << 10, 6);
  const auto submitter = [&] {
    constexpr std::size_t kJobs = 5;
    Buffer targets[kJobs];
    CopyOp ops[kJobs];
    CopyJob jobs[kJobs];
    Completion completion;
    for (std::size_t i = 0; i < kJobs; ++i) {
      targets[i].resize(source.size());
      ops[i] = contiguous(source, 0, targets[i], 0, source.size());
      jobs[i].prepare(&ops[i], 1, 8192);
      jobs[i].on_done(Completion::done, &completion);
    }
    for (unsigned round = 1; round <= 100; ++round) {
      for (Buffer& target : targets) std::fill(target.begin(), target.end(), std::byte{0});
      for (CopyJob& job : jobs) sut->submit(job);
      (void)completion.wait_for(round * kJobs);
      for (const Buffer& target : targets) ASSERT_TRUE(target == source);
    }
  };
  std::thread other(submitter);
  submitter();
  other.join();
}

TEST(CopyPool, DoneMaySubmitTheSameJobAgain) {
  struct Again {
    CopyPool* pool;
    CopyJob job;
    unsigned left = 50;
    Completion finished;
    static void done(void* context, CopyOutcome outcome) {
      auto& self = *static_cast<Again*>(context);
      if (--self.left > 0) {
        self.pool->submit(self.job);
      } else {
        Completion::done(&self.finished, outcome);
      }
    }
  };
  const Buffer source = numbered(100000, 7);
  Buffer target(100000);
  const CopyOp op = contiguous(source, 0, target, 0, source.size());
  const auto sut = pool_of(2);
  Again again;
  again.pool = sut.get();
  again.job.prepare(&op, 1, 8192);
  again.job.on_done(Again::done, &again);
  sut->submit(again.job);
  (void)again.finished.wait_for(1);
  EXPECT_TRUE(target == source);
}

TEST(CopyPool, FaultIsReportedWithItsOpAndThePoolGoesOn) {
  // Goal: a client that truncates its region, as source or as target, fails its own job only.
  // Method: three ops, the second one over a cut memfd; alternate with a healthy job on the same
  // pool.
  ASSERT_TRUE(install_sigbus_handler());
  const auto sut = pool_of(2);
  constexpr std::size_t kBytes = 1 << 20;
  const CutMapping cut(kBytes);
  const Buffer source = numbered(kBytes, 8);
  Buffer target(kBytes);
  Buffer other(kBytes);
  for (const bool cut_source : {true, false}) {
    std::vector<CopyOp> ops(3, contiguous(source, 0, target, 0, kBytes));
    ops[2].target = other.data();
    if (cut_source) {
      ops[1].source = cut.data();
      ops[1].target = other.data();
      ops[2].run_bytes = 0;
    } else {
      ops[1].target = cut.data();
    }
    CopyJob broken;
    Completion broken_done;
    broken.on_done(Completion::done, &broken_done);
    broken.prepare(ops.data(), ops.size(), 65536);
    const CopyOp healthy_op = contiguous(source, 0, target, 0, kBytes);
    CopyJob healthy;
    Completion healthy_done;
    healthy.on_done(Completion::done, &healthy_done);
    healthy.prepare(&healthy_op, 1, 65536);
    for (unsigned round = 1; round <= 20; ++round) {
      sut->submit(broken);
      const CopyOutcome outcome = broken_done.wait_for(round);
      EXPECT_EQ(outcome.status, CopyStatus::faulted);
      EXPECT_EQ(outcome.op, 1U);
      std::fill(target.begin(), target.end(), std::byte{0});
      sut->submit(healthy);
      EXPECT_EQ(healthy_done.wait_for(round).status, CopyStatus::ok);
      ASSERT_TRUE(target == source);
    }
    const CopyOutcome outcome = copy_inline(ops.data(), ops.size());
    EXPECT_EQ(outcome.status, CopyStatus::faulted);
    EXPECT_EQ(outcome.op, 1U);
  }
}

CopyOutcome outcome_of(CopyPool& pool, const CopyOp& op) {
  CopyJob job;
  Completion completion;
  job.on_done(Completion::done, &completion);
  job.prepare(&op, 1, 4096);
  pool.submit(job);
  return completion.wait_for(1);
}

TEST(CopyPool, FaultInAStridedOpIsReported) {
  ASSERT_TRUE(install_sigbus_handler());
  const auto sut = pool_of(2);
  const CutMapping cut(1 << 20);
  Buffer target(1 << 20);
  CopyOp op;
  op.source = cut.data();
  op.target = target.data();
  op.run_bytes = 100;
  op.loop_count = 1;
  op.loops[0] = {1024, 1024, 100};
  EXPECT_EQ(outcome_of(*sut, op).status, CopyStatus::faulted);
}

// Goal: the source of a cast is guarded as far as it is read. Method: float32 whose second half is
// cut off, read for bfloat16: the fault lies behind as many bytes as the target has.
TEST(CopyPool, FaultInTheSourceOfACastIsReported) {
  ASSERT_TRUE(install_sigbus_handler());
  const auto sut = pool_of(2);
  const CutMapping cut(1 << 20);
  Buffer target(1 << 19);
  CopyOp op;
  op.source = cut.data();
  op.target = target.data();
  op.run_bytes = target.size();
  op.cast = Cast::float32_to_bfloat16;
  EXPECT_EQ(copy_inline(&op, 1).status, CopyStatus::faulted);
  EXPECT_EQ(outcome_of(*sut, op).status, CopyStatus::faulted);
}

TEST(CopyPool, DestructionFinishesWhatWasSubmitted) {
  const Buffer source = numbered(1 << 20, 9);
  for (int round = 0; round < 20; ++round) {
    Buffer first_target(source.size());
    Buffer second_target(source.size());
    const CopyOp ops[] = {contiguous(source, 0, first_target, 0, source.size()),
                          contiguous(source, 0, second_target, 0, source.size())};
    CopyJob jobs[2];
    Completion completion;
    for (std::size_t i = 0; i < 2; ++i) {
      jobs[i].prepare(&ops[i], 1, 16384);
      jobs[i].on_done(Completion::done, &completion);
    }
    {
      const auto sut = pool_of(2);
      for (CopyJob& job : jobs) sut->submit(job);
    }
    (void)completion.wait_for(2);
    ASSERT_TRUE(first_target == source);
    ASSERT_TRUE(second_target == source);
  }
}

TEST(CopyPool, IdlePoolIsDestroyed) {
  for (const unsigned threads : {1U, 2U, 5U}) {
    const auto sut = pool_of(threads);
    EXPECT_EQ(sut->thread_count(), threads);
  }
}

TEST(CopyPool, ThreadsAreNamedPinnedAndDeafToSignals) {
  // Goal: by default one thread for each CPU of this process's mask, each on its own. Method: ask
  // the kernel.
  cpu_set_t mask;
  ASSERT_EQ(sched_getaffinity(0, sizeof mask, &mask), 0);
  const auto sut = pool_of(0);
  EXPECT_EQ(sut->thread_count(), static_cast<unsigned>(CPU_COUNT(&mask)));
  if (sut->pin_error() == 0) {
    EXPECT_EQ(sut->pinned_count(), sut->thread_count());
  } else {
    EXPECT_LT(sut->pinned_count(), sut->thread_count());
  }

  struct Seen {
    Completion completion;
    std::string name;
    int cpus = 0;
    bool term_blocked = false;
    bool bus_blocked = true;
    static void done(void* context, CopyOutcome outcome) {
      auto& self = *static_cast<Seen*>(context);
      char name[16] = {};
      pthread_getname_np(pthread_self(), name, sizeof name);
      self.name = name;
      cpu_set_t own;
      pthread_getaffinity_np(pthread_self(), sizeof own, &own);
      self.cpus = CPU_COUNT(&own);
      sigset_t blocked;
      pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
      self.term_blocked = sigismember(&blocked, SIGTERM) == 1;
      self.bus_blocked = sigismember(&blocked, SIGBUS) == 1;
      Completion::done(&self.completion, outcome);
    }
  } seen;
  CopyJob job;
  job.prepare(nullptr, 0);
  job.on_done(Seen::done, &seen);
  sut->submit(job);
  (void)seen.completion.wait_for(1);
  EXPECT_EQ(seen.name.rfind("refit-copy-", 0), 0U) << seen.name;
  EXPECT_TRUE(seen.term_blocked);
  EXPECT_FALSE(seen.bus_blocked);
  if (sut->pin_error() == 0) {
    EXPECT_EQ(seen.cpus, 1);
  }
}

TEST(CopyPool, MoreThreadsThanCpusStillCopy) {
  cpu_set_t mask;
  ASSERT_EQ(sched_getaffinity(0, sizeof mask, &mask), 0);
  const auto cpus = static_cast<unsigned>(CPU_COUNT(&mask));
  const auto sut = pool_of(cpus + 3);
  EXPECT_LE(sut->pinned_count(), cpus);
  const Buffer source = numbered(3 << 20, 10);
  Buffer target(3 << 20);
  expect_copies(*sut, {contiguous(source, 0, target, 0, source.size())}, target);
}

}  // namespace
}  // namespace refit
