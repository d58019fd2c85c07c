// Copies: what moves, what is refused, and what hardware would let pass.

#include "unit/fake_cuda/fixture.hpp"

namespace fakecuda::test {
namespace {

constexpr std::size_t kCopyBytes = 5 * 4096 + 321;

class FakeCopy : public FakeCuda {
 protected:
  void SetUp() override {
    FakeCuda::SetUp();
    stream_ = make_stream();
    from_ = allocate(kCopyBytes);
    to_ = allocate(kCopyBytes);
    MUST(cuda().cuMemsetD8Async(from_, 7, kCopyBytes, stream_));
    MUST(cuda().cuStreamSynchronize(stream_));
  }
  void TearDown() override {
    MUST(cuda().cuStreamSynchronize(stream_));
    MUST(cuda().cuStreamDestroy(stream_));
    MUST(cuda().cuMemFree(from_));
    MUST(cuda().cuMemFree(to_));
    FakeCuda::TearDown();
  }

  struct BatchArguments {
    std::vector<CUdeviceptr> to, from;
    std::vector<std::size_t> bytes;
    std::vector<CUmemcpyAttributes> attributes = std::vector<CUmemcpyAttributes>(1);
    std::vector<std::size_t> firsts{0};
  };
  BatchArguments two_copies(CUmemcpySrcAccessOrder order = CU_MEMCPY_SRC_ACCESS_ORDER_STREAM) {
    BatchArguments made;
    made.to = {to_, to_ + 4096};
    made.from = {from_, from_ + 4096};
    made.bytes = {4096, kCopyBytes - 4096};
    made.attributes[0].srcAccessOrder = order;
    return made;
  }
  CUresult batch(BatchArguments arguments, CUstream stream) {
    return cuda().batch_13000(arguments.to.data(), arguments.from.data(), arguments.bytes.data(),
                              arguments.to.size(), arguments.attributes.data(),
                              arguments.firsts.data(), arguments.firsts.size(), stream);
  }
  CUresult old_batch(BatchArguments arguments, std::size_t* failed, CUstream stream) {
    return cuda().batch_12080(arguments.to.data(), arguments.from.data(), arguments.bytes.data(),
                              arguments.to.size(), arguments.attributes.data(),
                              arguments.firsts.data(), arguments.firsts.size(), failed, stream);
  }

  CUstream stream_ = nullptr;
  CUdeviceptr from_ = 0;
  CUdeviceptr to_ = 0;
};

TEST_F(FakeCopy, EveryWayMovesTheBytes) {
  const auto expect_moved = [&] {
    MUST(cuda().cuStreamSynchronize(stream_));
    EXPECT_TRUE(device_is_all(to_, kCopyBytes, 7));
    MUST(cuda().cuMemsetD8Async(to_, 0, kCopyBytes, stream_));
    MUST(cuda().cuStreamSynchronize(stream_));
  };
  MUST(cuda().cuMemcpyAsync(to_, from_, kCopyBytes, stream_));
  expect_moved();
  MUST(cuda().cuMemcpyDtoDAsync(to_, from_, kCopyBytes, stream_));
  expect_moved();
  MUST(cuda().cuMemcpyPeerAsync(to_, contexts_[0], from_, contexts_[1], kCopyBytes, stream_));
  expect_moved();
  MUST(cuda().cuMemcpyDtoD(to_, from_, kCopyBytes));
  expect_moved();
  MUST(batch(two_copies(), stream_));
  expect_moved();
  std::size_t failed = 0;
  MUST(old_batch(two_copies(), &failed, stream_));
  expect_moved();
  {
    Pinned host(kCopyBytes);
    MUST(cuda().cuMemcpyDtoHAsync(host.data(), from_, kCopyBytes, stream_));
    MUST(cuda().cuMemcpyHtoDAsync(to_, host.data(), kCopyBytes, stream_));
    expect_moved();
  }

  // 2D: three rows of 100 bytes, 200 apart, to 300 apart.
  CUDA_MEMCPY2D plane{};
  plane.srcMemoryType = CU_MEMORYTYPE_DEVICE;
  plane.srcDevice = from_;
  plane.srcPitch = 200;
  plane.dstMemoryType = CU_MEMORYTYPE_UNIFIED;
  plane.dstDevice = to_;
  plane.dstPitch = 300;
  plane.dstXInBytes = 10;
  plane.WidthInBytes = 100;
  plane.Height = 3;
  MUST(cuda().cuMemcpy2DAsync(&plane, stream_));
  MUST(cuda().cuStreamSynchronize(stream_));
  EXPECT_TRUE(device_is_all(to_ + 610, 100, 7));
  EXPECT_TRUE(device_is_all(to_ + 110, 200, 0));
  EXPECT_TRUE(device_is_all(to_ + 710, 100, 0));
  plane.srcPitch = 50;
  EXPECT_EQ(cuda().cuMemcpy2DAsync(&plane, stream_), CUDA_ERROR_INVALID_VALUE);
}

TEST_F(FakeCopy, BatchArgumentsAreChecked) {
  BatchArguments none = two_copies();
  none.to.clear();
  EXPECT_EQ(batch(none, stream_), CUDA_ERROR_INVALID_VALUE);
  for (const std::vector<std::size_t>& firsts :
       {std::vector<std::size_t>{1}, {0, 0}, {0, 2}, {0, 1, 1}}) {
    BatchArguments wrong = two_copies();
    wrong.firsts = firsts;
    wrong.attributes.resize(firsts.size(), wrong.attributes[0]);
    EXPECT_EQ(batch(wrong, stream_), CUDA_ERROR_INVALID_VALUE);
  }
  EXPECT_EQ(batch(two_copies(CU_MEMCPY_SRC_ACCESS_ORDER_INVALID), stream_),
            CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(batch(two_copies(), nullptr), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(violated("NULL stream"));

  BatchArguments beyond = two_copies();
  beyond.bytes[1] += 1;
  std::size_t failed = 77;
  EXPECT_EQ(old_batch(beyond, &failed, stream_), CUDA_ERROR_INVALID_VALUE);
  EXPECT_EQ(failed, 1U);
  EXPECT_TRUE(violated("past the end"));

  BatchArguments twice = two_copies();
  twice.to[1] = to_ + 100;
  twice.bytes[1] = 100;
  MUST(batch(twice, stream_));
  EXPECT_TRUE(violated("depend on each other"));
  BatchArguments chained = two_copies();
  chained.bytes = {100, 100};
  chained.from[1] = to_ + 50;
  MUST(batch(chained, stream_));
  EXPECT_TRUE(violated("depend on each other"));
}

// Goal: either entry notices when it is called through the other's prototype.
TEST_F(FakeCopy, WrongAbiIsNoticed) {
  BatchArguments arguments = two_copies();
  const auto old_entry_new_prototype =
      reinterpret_cast<PFN_cuMemcpyBatchAsync_v13000>(reinterpret_cast<void*>(cuda().batch_12080));
  EXPECT_NE(
      old_entry_new_prototype(arguments.to.data(), arguments.from.data(), arguments.bytes.data(), 2,
                              arguments.attributes.data(), arguments.firsts.data(), 1, stream_),
      CUDA_SUCCESS);
  EXPECT_TRUE(violated("12.8 entry"));
  const auto new_entry_old_prototype =
      reinterpret_cast<PFN_cuMemcpyBatchAsync_v12080>(reinterpret_cast<void*>(cuda().batch_13000));
  std::size_t failed = 0;
  EXPECT_NE(new_entry_old_prototype(arguments.to.data(), arguments.from.data(),
                                    arguments.bytes.data(), 2, arguments.attributes.data(),
                                    arguments.firsts.data(), 1, &failed, stream_),
            CUDA_SUCCESS);
  EXPECT_TRUE(violated("no stream"));
}

// Goal: the order of access to the source is what the attributes allow. Method: write the source on
// the stream before the batch, and on the host after the call.
TEST_F(FakeCopy, SourceIsReadWhenTheAttributeAllows) {
  std::map<int, int> seen;
  for (int seed = 0; seed < 20; ++seed) {
    configure({{"SEED", std::to_string(seed)}});
    for (const auto order :
         {CU_MEMCPY_SRC_ACCESS_ORDER_STREAM, CU_MEMCPY_SRC_ACCESS_ORDER_DURING_API_CALL,
          CU_MEMCPY_SRC_ACCESS_ORDER_ANY}) {
      Pinned source(kCopyBytes, 1);
      MUST(cuda().cuMemsetD8Async(source.address(), 2, kCopyBytes, stream_));
      BatchArguments arguments = two_copies(order);
      arguments.to.resize(1);
      arguments.from = {source.address()};
      arguments.bytes = {kCopyBytes};
      MUST(batch(arguments, stream_));
      MUST(cuda().cuStreamSynchronize(stream_));
      const bool late = device_is_all(to_, kCopyBytes, 2);
      EXPECT_TRUE(late || device_is_all(to_, kCopyBytes, 1));
      if (order == CU_MEMCPY_SRC_ACCESS_ORDER_ANY) {
        ++seen[late ? 1 : 0];
      } else {
        EXPECT_EQ(late, order == CU_MEMCPY_SRC_ACCESS_ORDER_STREAM);
      }
    }
  }
  EXPECT_EQ(seen.size(), 2U) << "ANY is both, by seed";
}

TEST_F(FakeCopy, PointersAreCheckedWhenAsked) {
  EXPECT_EQ(cuda().cuMemcpyAsync(to_, from_ + 1, kCopyBytes, stream_), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(violated("past the end"));
  EXPECT_EQ(cuda().cuMemcpyDtoD(to_ + kCopyBytes, from_, 1), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(violated("in no allocation"));
  const CUdeviceptr stale = allocate(kCopyBytes);
  MUST(cuda().cuMemFree(stale));
  EXPECT_EQ(cuda().cuMemcpyAsync(to_, stale, 1, stream_), CUDA_ERROR_INVALID_VALUE);
  EXPECT_TRUE(violated("was freed"));
  std::vector<unsigned char> pageable(kCopyBytes, 9);
  MUST(cuda().cuMemcpyHtoDAsync(to_, pageable.data(), kCopyBytes, stream_));
  EXPECT_TRUE(violated("pageable"));
  EXPECT_TRUE(device_is_all(to_, kCopyBytes, 9));
}

}  // namespace
}  // namespace fakecuda::test
