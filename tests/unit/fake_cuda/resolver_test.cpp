// Which entry a name and a version lead to, on drivers of several versions.

#include "unit/fake_cuda/fixture.hpp"
#include "unit/fake_cuda/peer.hpp"

namespace fakecuda::test {
namespace {

class FakeResolver : public FakeCuda {
 protected:
  struct Found {
    int result;
    int status;
  };
  static Found ask(const Peer& peer, const char* name, int version) {
    Question question;
    question.order = Order::resolve;
    question.number = static_cast<std::uint64_t>(version);
    std::strncpy(question.text, name, sizeof question.text - 1);
    const Answer answer = peer.ask(question);
    return {answer.result, static_cast<int>(answer.value)};
  }
};

TEST_F(FakeResolver, AnswersDependOnTheDriversVersion) {
  constexpr int kFound = CU_GET_PROC_ADDRESS_SUCCESS;
  constexpr int kUnknown = CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  constexpr int kTooOld = CU_GET_PROC_ADDRESS_VERSION_NOT_SUFFICIENT;
  struct Case {
    const char* driver;
    const char* name;
    int version;
    int result;
    int status;
  };
  const Case cases[] = {
      {"13000", "cuMemcpyBatchAsync", 13000, CUDA_SUCCESS, kFound},
      {"13000", "cuMemcpyBatchAsync", 12080, CUDA_SUCCESS, kFound},
      {"13000", "cuMemcpyBatchAsync", 12070, CUDA_SUCCESS, kTooOld},
      {"13000", "cuNoSuchThing", 13000, CUDA_SUCCESS, kUnknown},
      {"13000", "cuMemAlloc", 13010, CUDA_ERROR_INVALID_VALUE, kFound},
      {"12080", "cuMemcpyBatchAsync", 12080, CUDA_SUCCESS, kFound},
      {"12080", "cuMemcpyBatchAsync", 13000, CUDA_ERROR_INVALID_VALUE, kFound},
      {"12000", "cuMemcpyBatchAsync", 12000, CUDA_SUCCESS, kUnknown},
      {"12000", "cuMemAlloc", 12000, CUDA_SUCCESS, kFound},
      {"12000", "cuMemCreate", 10010, CUDA_SUCCESS, kTooOld},
  };
  for (const Case& c : cases) {
    const Peer peer(Environment{{"FAKECUDA_DRIVER_VERSION", c.driver}});
    const Found found = ask(peer, c.name, c.version);
    EXPECT_EQ(found.result, c.result) << c.driver << ' ' << c.name << ' ' << c.version;
    if (found.result != CUDA_SUCCESS) continue;
    EXPECT_EQ(found.status, c.status) << c.driver << ' ' << c.name << ' ' << c.version;
  }
}

TEST_F(FakeResolver, BareNamesAreTheOldEntries) {
  const auto symbol = [](const char* name) { return ::dlsym(cuda().library, name); };
  EXPECT_EQ(symbol("cuMemcpyBatchAsync"), reinterpret_cast<void*>(cuda().batch_12080));
  EXPECT_EQ(symbol("cuMemcpyBatchAsync_v2"), reinterpret_cast<void*>(cuda().batch_13000));
  EXPECT_EQ(symbol("cuMemAlloc_v2"), reinterpret_cast<void*>(cuda().cuMemAlloc));
  const auto old_alloc =
      reinterpret_cast<CUresult (*)(unsigned int*, unsigned int)>(symbol("cuMemAlloc"));
  ASSERT_NE(old_alloc, nullptr);
  unsigned int pointer = 0;
  EXPECT_NE(old_alloc(&pointer, 1), CUDA_SUCCESS);
  EXPECT_TRUE(violated("32-bit"));

  const auto resolve_without_status =
      reinterpret_cast<PFN_cuGetProcAddress_v11030>(symbol("cuGetProcAddress"));
  void* found = nullptr;
  EXPECT_EQ(resolve_without_status("cuMemAlloc", &found, 12000, 0), CUDA_SUCCESS);
  EXPECT_EQ(found, symbol("cuMemAlloc_v2"));
  EXPECT_EQ(resolve_without_status("cuNoSuchThing", &found, 12000, 0), CUDA_ERROR_NOT_FOUND);
}

TEST_F(FakeResolver, DevicesAreDescribed) {
  int count = 0;
  int version = 0;
  MUST(cuda().cuDeviceGetCount(&count));
  MUST(cuda().cuDriverGetVersion(&version));
  EXPECT_EQ(count, 2);
  EXPECT_EQ(version, 13000);
  CUuuid uuids[2];
  for (CUdevice device = 0; device < 2; ++device) {
    MUST(cuda().cuDeviceGetUuid(&uuids[device], device));
    int value = 0;
    MUST(cuda().cuDeviceGetAttribute(&value, CU_DEVICE_ATTRIBUTE_IPC_EVENT_SUPPORTED, device));
    EXPECT_EQ(value, 1);
    std::size_t bytes = 0;
    MUST(cuda().cuDeviceTotalMem(&bytes, device));
    EXPECT_EQ(bytes, std::size_t{16} << 30);
    char id[16];
    MUST(cuda().cuDeviceGetPCIBusId(id, sizeof id, device));
    EXPECT_STREQ(id, device == 0 ? "0000:10:00.0" : "0000:11:00.0");
  }
  EXPECT_NE(std::memcmp(&uuids[0], &uuids[1], sizeof(CUuuid)), 0);
  CUdevice device = 0;
  EXPECT_EQ(cuda().cuDeviceGet(&device, 2), CUDA_ERROR_INVALID_DEVICE);
  int can = 0;
  MUST(cuda().cuDeviceCanAccessPeer(&can, 0, 1));
  EXPECT_EQ(can, 1);
  MUST(cuda().cuCtxEnablePeerAccess(contexts_[1], 0));
  EXPECT_EQ(cuda().cuCtxEnablePeerAccess(contexts_[1], 0), CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED);
  const char* name = nullptr;
  MUST(cuda().cuGetErrorName(CUDA_ERROR_ILLEGAL_ADDRESS, &name));
  EXPECT_STREQ(name, "CUDA_ERROR_ILLEGAL_ADDRESS");
}

}  // namespace
}  // namespace fakecuda::test
