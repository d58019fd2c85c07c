// Devices by UUID, and contexts that are retained once and given back.

#include "unit/cuda/fixture.hpp"

namespace refit::cuda::test {
namespace {

class DevicesTest : public CudaTest {};

TEST(DeviceUuid, IsWrittenAsNvidiaSmiDoes) {
  DeviceUuid uuid;
  for (std::size_t i = 0; i < 16; ++i) uuid.bytes[i] = static_cast<std::uint8_t>(0x10 * i + i);
  EXPECT_EQ(uuid.text(), "GPU-00112233-4455-6677-8899-aabbccddeeff");
}

TEST_F(DevicesTest, AreFoundByTheUuidThatTheDriverTells) {
  ASSERT_EQ(devices_->all().size(), 2U);
  for (const Device& device : devices_->all()) {
    CUuuid uuid{};
    must(cuda().cuDeviceGetUuid(&uuid, device.ordinal));
    DeviceUuid told;
    std::memcpy(told.bytes.data(), uuid.bytes, sizeof uuid.bytes);
    EXPECT_EQ(devices_->find(told), &device);
    EXPECT_EQ(devices_->find(device.ordinal), &device);
    EXPECT_GT(device.memory_bytes, 0U);
    EXPECT_TRUE(device.vmm && device.posix_fd_handles && device.ipc_events &&
                device.unified_addressing && device.read_only_host_register);
    EXPECT_EQ(device.peers, std::vector<CUdevice>{1 - device.ordinal});
  }
  DeviceUuid unknown = devices_->all()[0].uuid;
  unknown.bytes[15] ^= 1;
  EXPECT_EQ(devices_->find(unknown), nullptr);
  EXPECT_EQ(devices_->find(2), nullptr);
}

// A device that cannot be asked is not one that lacks what it was asked for.
TEST_F(DevicesTest, AnAttributeThatCannotBeReadIsAnError) {
  for (int call = 1; call <= 12; ++call) {
    faults("cuDeviceGetAttribute#" + std::to_string(call) + "=999");
    EXPECT_TRUE(refuses(VisibleDevices::open(), Errc::cuda, "cuDeviceGetAttribute")) << call;
  }
  // As a driver answers that is older than the attribute.
  faults("cuDeviceGetAttribute#4=1");
  const auto old = VisibleDevices::open();
  ASSERT_TRUE(old) << old.error().to_string();
  EXPECT_FALSE((*old)->all().front().ipc_events);
}

TEST_F(DevicesTest, AContextIsRetainedOnceAndOnlyWhenItIsAskedFor) {
  EXPECT_EQ(held("contexts"), 0U);
  const std::uint64_t before = calls("cuDevicePrimaryCtxRetain");
  const auto first = context();
  EXPECT_EQ(context(), first);
  EXPECT_EQ(calls("cuDevicePrimaryCtxRetain"), before + 1);
  EXPECT_EQ(held("contexts"), 1U);
  const auto other = context(1);
  EXPECT_NE(other, first);
  EXPECT_EQ(held("contexts"), 2U);
}

TEST_F(DevicesTest, AContextOutlivesItsOwnerWhileSomethingIsInIt) {
  auto kept = context();
  devices_.reset();
  EXPECT_EQ(held("contexts"), 1U);
  kept.reset();
  EXPECT_EQ(held("contexts"), 0U);
}

TEST_F(DevicesTest, CurrentGivesTheThreadItsOwnContextBack) {
  const auto outer = context(0);
  const auto inner = context(1);
  const auto now = [] {
    CUcontext current = nullptr;
    must(cuda().cuCtxGetCurrent(&current));
    return current;
  };
  ASSERT_EQ(now(), nullptr);
  {
    auto first = Current::enter(*outer);
    ASSERT_TRUE(first);
    EXPECT_EQ(now(), outer->handle());
    {
      const auto second = Current::enter(*inner);
      EXPECT_EQ(now(), inner->handle());
    }
    EXPECT_EQ(now(), outer->handle());
    const Current moved = std::move(*first);
    EXPECT_EQ(now(), outer->handle());
  }
  EXPECT_EQ(now(), nullptr);
}

TEST_F(DevicesTest, AContextThatFailsIsToldAndAskedForAgain) {
  faults("cuDevicePrimaryCtxRetain#1=2");
  EXPECT_TRUE(
      refuses(devices_->context(devices_->all()[0]), Errc::cuda, devices_->all()[0].uuid.text()));
  EXPECT_NE(context(), nullptr);
}

TEST_F(DevicesTest, AnExclusiveDeviceIsToldFromABrokenOne) {
  const Environment exclusive{{"FAKECUDA_DEVICE_0", "compute_mode=3"}};
  const ExporterProcess has(exclusive);
  const ExporterProcess wants(exclusive);
  ASSERT_EQ(has.ask({.act = Act::retain}).code, Errc::ok);
  const Answer refused = wants.ask({.act = Act::retain});
  EXPECT_EQ(refused.code, Errc::cuda);
  EXPECT_NE(std::string(refused.message).find("nvidia-smi -c DEFAULT"), std::string::npos)
      << refused.message;
}

}  // namespace
}  // namespace refit::cuda::test
