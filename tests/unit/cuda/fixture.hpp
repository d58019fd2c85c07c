// CudaTest: the code under test on the fake driver, and the check that a test leaves nothing in it.
//
// No context is current on the test's thread, as none is on the daemon's.
#pragma once

#include <dirent.h>

#include <algorithm>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "memory/cuda/device.hpp"
#include "unit/cuda/exporter.hpp"
#include "unit/fake_cuda/fixture.hpp"

namespace refit::cuda::test {

class CudaTest : public fakecuda::test::FakeCuda {
 protected:
  void SetUp() override {
    fakecuda::test::directory();
    cuda();  // before the code under test looks for a driver
    auto opened = VisibleDevices::open();
    ASSERT_TRUE(opened) << opened.error().to_string();
    devices_ = *opened;
    configure({});
  }
  void TearDown() override {
    faults("");
    devices_.reset();
    EXPECT_EQ(violations(), "");
    expect_nothing_held();
    EXPECT_EQ(held("contexts"), 0U);
    configure({});
  }

  [[nodiscard]] static std::uint64_t held(const char* what) { return cuda().control.gauge(what); }
  [[nodiscard]] static std::uint64_t calls(const char* name) { return cuda().control.calls(name); }
  static void faults(const std::string& which) {
    ASSERT_EQ(cuda().control.set_faults(which.c_str()), 0);
  }
  /// Lets each of these calls fail in turn, the first, the second and so on, while `attempt` runs;
  /// returns how many attempts failed. Calls that give back are not among them: what they leave
  /// when they fail, nobody can give back.
  template <typename Attempt>
  static int fail_each(std::initializer_list<const char*> names, Attempt&& attempt) {
    int failed = 0;
    for (const char* name : names) {
      for (int call = 1; call <= 12; ++call) {
        faults(std::string(name) + "#" + std::to_string(call) + "=2");
        if (!attempt()) ++failed;
        faults("");
      }
    }
    return failed;
  }
  static void expect_nothing_held() {
    for (const char* what : {"allocations", "imports", "allocation_handles", "reservations",
                             "mappings", "pinned_ranges", "events"})
      EXPECT_EQ(held(what), 0U) << what;
  }
  [[nodiscard]] static std::size_t open_fds() {
    const std::filesystem::directory_iterator fds("/proc/self/fd");
    return static_cast<std::size_t>(std::distance(begin(fds), end(fds)));
  }
  [[nodiscard]] std::shared_ptr<const Context> context(std::size_t index = 0) const {
    auto made = devices_->context(devices_->all()[index]);
    EXPECT_TRUE(made) << made.error().to_string();
    return *made;
  }
  /// Whether device memory holds what MadeMemory wrote from `first` on.
  [[nodiscard]] bool holds_pattern(CUdeviceptr address, std::uint64_t bytes,
                                   std::uint64_t first) const {
    std::vector<unsigned char> read(bytes);
    const auto held_context = context();
    const auto current = Current::enter(*held_context);
    EXPECT_TRUE(current);
    if (cuda().cuMemcpyDtoH(read.data(), address, bytes) != CUDA_SUCCESS) return false;
    for (std::uint64_t i = 0; i < bytes; ++i) {
      if (read[i] != pattern(first + i)) return false;
    }
    return true;
  }

  std::shared_ptr<VisibleDevices> devices_;
};

/// Refused with this code and a message that says so.
template <typename T>
::testing::AssertionResult refuses(const Result<T>& result, Errc code, const std::string& words) {
  if (result) return ::testing::AssertionFailure() << "it was taken";
  if (result.error().code != code || result.error().message.find(words) == std::string::npos)
    return ::testing::AssertionFailure() << result.error().to_string();
  return ::testing::AssertionSuccess() << result.error().to_string();
}

}  // namespace refit::cuda::test
