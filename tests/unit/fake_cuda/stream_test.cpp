// Streams and events within one process: when work runs, and what waits for it.

#include <atomic>
#include <thread>

#include "unit/fake_cuda/fixture.hpp"

namespace fakecuda::test {
namespace {

constexpr std::size_t kStreamBytes = 64 * 1024 + 123;

class FakeStream : public FakeCuda {};

// Goal: what the schedule says is what happens, and a synchronising call is what makes lazy work
// run. Method: look at pinned memory, which the CPU may read without asking.
TEST_F(FakeStream, WorkRunsAtOnceOrWhenItIsNeeded) {
  for (const bool eager : {true, false}) {
    configure({{"SCHEDULE", eager ? "eager" : "lazy"}});
    const CUstream stream = make_stream();
    Pinned host(kStreamBytes, 1);
    MUST(cuda().cuMemsetD8Async(host.address(), 2, kStreamBytes, stream));
    EXPECT_TRUE(host.is_all(eager ? 2 : 1));
    MUST(cuda().cuStreamSynchronize(stream));
    EXPECT_TRUE(host.is_all(2));
    MUST(cuda().cuStreamDestroy(stream));
  }
}

TEST_F(FakeStream, PatternGivesEachStreamItsSchedule) {
  configure({{"SCHEDULE", "eager,lazy"}});
  Pinned hosts[] = {Pinned(kStreamBytes, 1), Pinned(kStreamBytes, 1), Pinned(kStreamBytes, 1)};
  std::vector<CUstream> streams;
  for (Pinned& host : hosts) {
    streams.push_back(make_stream());
    MUST(cuda().cuMemsetD8Async(host.address(), 2, kStreamBytes, streams.back()));
  }
  EXPECT_TRUE(hosts[0].is_all(2));
  EXPECT_TRUE(hosts[1].is_all(1));
  EXPECT_TRUE(hosts[2].is_all(2));
  MUST(cuda().cuCtxSynchronize());
  EXPECT_TRUE(hosts[1].is_all(2));
  for (const CUstream stream : streams) MUST(cuda().cuStreamDestroy(stream));
}

// Goal: a copy that blocks waits for the streams that did not opt out of it, and for no others.
TEST_F(FakeStream, BlockingCopyWaitsForBlockingStreamsOnly) {
  for (const unsigned int flags : {CU_STREAM_DEFAULT, CU_STREAM_NON_BLOCKING}) {
    CUstream stream = nullptr;
    MUST(cuda().cuStreamCreateWithPriority(&stream, flags, -100));
    const CUdeviceptr device = allocate(kStreamBytes);
    MUST(cuda().cuMemsetD8Async(device, 5, kStreamBytes, stream));
    EXPECT_EQ(device_is_all(device, kStreamBytes, 5), flags == CU_STREAM_DEFAULT);
    MUST(cuda().cuStreamSynchronize(stream));
    MUST(cuda().cuMemFree(device));
    MUST(cuda().cuStreamDestroy(stream));
  }
}

// Goal: who polls gets an end, without a clock.
TEST_F(FakeStream, PollingEnds) {
  const CUstream stream = make_stream();
  const CUevent event = make_event();
  Pinned host(kStreamBytes, 1);
  for (const bool by_event : {true, false}) {
    MUST(cuda().cuMemsetD8Async(host.address(), 2, kStreamBytes, stream));
    MUST(cuda().cuEventRecord(event, stream));
    const auto poll = [&] {
      return by_event ? cuda().cuEventQuery(event) : cuda().cuStreamQuery(stream);
    };
    int not_ready = 0;
    CUresult last = CUDA_ERROR_NOT_READY;
    while (not_ready < 100 && (last = poll()) == CUDA_ERROR_NOT_READY) ++not_ready;
    EXPECT_EQ(last, CUDA_SUCCESS);
    EXPECT_GE(not_ready, 1);
    EXPECT_TRUE(host.is_all(2));
  }
  MUST(cuda().cuEventDestroy(event));
  MUST(cuda().cuStreamDestroy(stream));
}

// Goal: the end of the second record of an event does not release who waits for the first.
TEST_F(FakeStream, RecordsOfOneEventAreToldApart) {
  const CUstream slow = make_stream();
  const CUstream quick = make_stream();
  const CUstream waiting = make_stream();
  const CUevent event = make_event();
  Pinned first(kStreamBytes, 1);
  Pinned copy(kStreamBytes, 0);
  MUST(cuda().cuMemsetD8Async(first.address(), 2, kStreamBytes, slow));
  MUST(cuda().cuEventRecord(event, slow));
  MUST(cuda().cuStreamWaitEvent(waiting, event, 0));
  MUST(cuda().cuMemcpyAsync(copy.address(), first.address(), kStreamBytes, waiting));
  MUST(cuda().cuEventRecord(event, quick));
  MUST(cuda().cuEventSynchronize(event));
  EXPECT_TRUE(first.is_all(1)) << "the first record's work ran for the second";
  MUST(cuda().cuStreamSynchronize(waiting));
  EXPECT_TRUE(copy.is_all(2));
  for (const CUstream stream : {slow, quick, waiting}) MUST(cuda().cuStreamDestroy(stream));
  MUST(cuda().cuEventDestroy(event));
}

// Goal: an event may be recorded more often than it has places for pending records, and a waiter
// for one of the first still waits for that one.
TEST_F(FakeStream, ManyPendingRecordsAreNotLost) {
  const CUstream first = make_stream();
  const CUstream waiting = make_stream();
  const CUstream later = make_stream();
  const CUevent event = make_event();
  Pinned source(kStreamBytes, 1);
  Pinned copy(kStreamBytes, 0);
  MUST(cuda().cuMemsetD8Async(source.address(), 2, kStreamBytes, first));
  MUST(cuda().cuEventRecord(event, first));
  MUST(cuda().cuStreamWaitEvent(waiting, event, 0));
  MUST(cuda().cuMemcpyAsync(copy.address(), source.address(), kStreamBytes, waiting));
  for (int i = 0; i < 200; ++i) MUST(cuda().cuEventRecord(event, later));
  MUST(cuda().cuStreamSynchronize(waiting));
  EXPECT_TRUE(copy.is_all(2));
  MUST(cuda().cuEventSynchronize(event));
  MUST(cuda().cuEventDestroy(event));
  for (const CUstream stream : {first, waiting, later}) MUST(cuda().cuStreamDestroy(stream));
}

// Goal: with the same seed everything happens in the same order, with another one it does not.
// Method: copies within a batch that overlap leave bytes that depend on the order.
TEST_F(FakeStream, SeedAloneDecides) {
  const auto run = [&](const std::string& seed) {
    configure({{"SEED", seed}, {"SCHEDULE", "mixed"}, {"ON_VIOLATION", "ignore"}});
    const CUstream stream = make_stream();
    Pinned sources(16 * 4096);
    for (std::size_t i = 0; i < 16; ++i) std::memset(sources.data() + i * 4096, int(i), 4096);
    Pinned target(4096);
    std::vector<CUdeviceptr> to(16, target.address());
    std::vector<CUdeviceptr> from;
    for (std::size_t i = 0; i < 16; ++i) from.push_back(sources.address() + i * 4096);
    std::vector<std::size_t> bytes(16, 4096);
    CUmemcpyAttributes attributes{};
    attributes.srcAccessOrder = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM;
    std::size_t first = 0;
    EXPECT_EQ(cuda().batch_13000(to.data(), from.data(), bytes.data(), 16, &attributes, &first, 1,
                                 stream),
              CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_SUCCESS);
    EXPECT_EQ(cuda().cuStreamDestroy(stream), CUDA_SUCCESS);
    EXPECT_TRUE(violated("depend on each other"));
    return target.data()[0];
  };
  std::map<int, int> seen;
  for (int seed = 0; seed < 20; ++seed) {
    const int first = run(std::to_string(seed));
    EXPECT_EQ(run(std::to_string(seed)), first) << "seed " << seed;
    ++seen[first];
  }
  EXPECT_GT(seen.size(), 4U);
}

// Goal: threads may use the driver at once, each with a stream of its own.
TEST_F(FakeStream, ThreadsDoNotDisturbEachOther) {
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (unsigned char value = 1; value <= 4; ++value) {
    threads.emplace_back([&, value] {
      EXPECT_EQ(cuda().cuCtxPushCurrent(contexts_[0]), CUDA_SUCCESS);
      const CUstream stream = make_stream();
      const CUdeviceptr device = allocate(kStreamBytes);
      for (int round = 0; round < 20; ++round) {
        Pinned host(kStreamBytes, value);
        EXPECT_EQ(cuda().cuMemcpyHtoDAsync(device, host.data(), kStreamBytes, stream),
                  CUDA_SUCCESS);
        EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_SUCCESS);
        std::memset(host.data(), 0, kStreamBytes);
        EXPECT_EQ(cuda().cuMemcpyDtoHAsync(host.data(), device, kStreamBytes, stream),
                  CUDA_SUCCESS);
        EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_SUCCESS);
        right += host.is_all(value) ? 1 : 0;
      }
      EXPECT_EQ(cuda().cuMemFree(device), CUDA_SUCCESS);
      EXPECT_EQ(cuda().cuStreamDestroy(stream), CUDA_SUCCESS);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(right, 80);
}

TEST_F(FakeStream, MisuseIsSeen) {
  const CUstream stream = make_stream();
  const CUevent event = make_event();
  Pinned host(kStreamBytes);

  EXPECT_NE(cuda().cuMemsetD8Async(host.address(), 1, kStreamBytes, nullptr), CUDA_SUCCESS);
  EXPECT_TRUE(violated("NULL stream"));
  EXPECT_NE(cuda().cuMemsetD8Async(host.address(), 1, kStreamBytes, CU_STREAM_LEGACY),
            CUDA_SUCCESS);
  EXPECT_TRUE(violated("NULL stream"));

  EXPECT_EQ(cuda().cuStreamWaitEvent(stream, event, 0), CUDA_SUCCESS);
  EXPECT_TRUE(violated("never recorded"));

  MUST(cuda().cuCtxPushCurrent(contexts_[1]));
  EXPECT_NE(cuda().cuMemsetD8Async(host.address(), 1, kStreamBytes, stream), CUDA_SUCCESS);
  EXPECT_TRUE(violated("another context"));
  CUcontext popped = nullptr;
  MUST(cuda().cuCtxPopCurrent(&popped));
  EXPECT_EQ(popped, contexts_[1]);

  MUST(cuda().cuCtxPopCurrent(&popped));
  EXPECT_EQ(cuda().cuStreamSynchronize(stream), CUDA_ERROR_INVALID_CONTEXT);
  CUdeviceptr pointer = 0;
  EXPECT_EQ(cuda().cuMemAlloc(&pointer, 1), CUDA_ERROR_INVALID_CONTEXT);
  MUST(cuda().cuCtxPushCurrent(popped));

  MUST(cuda().cuEventDestroy(event));
  MUST(cuda().cuStreamDestroy(stream));
  EXPECT_NE(cuda().cuMemsetD8Async(host.address(), 1, kStreamBytes, stream), CUDA_SUCCESS);
  EXPECT_TRUE(violated("was destroyed"));
  EXPECT_EQ(cuda().cuEventQuery(event), CUDA_ERROR_INVALID_HANDLE);
  CUevent timed = nullptr;
  EXPECT_EQ(cuda().cuEventCreate(&timed, CU_EVENT_INTERPROCESS), CUDA_ERROR_INVALID_VALUE);
}

}  // namespace
}  // namespace fakecuda::test
