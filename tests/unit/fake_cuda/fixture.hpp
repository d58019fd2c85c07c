// FakeCuda: the driver in the test's own process, and the check that a test leaves nothing in it.
//
// A process has one driver, so all tests of the program share it: each begins with a reload of the
// environment, and ends with nothing held and no violation that it did not take. One thread.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "unit/fake_cuda/cuda_api.hpp"

namespace fakecuda::test {

#define MUST(call) ASSERT_EQ((call), CUDA_SUCCESS)

/// FAKECUDA_DIR of this program, and gone with it.
inline const std::string& directory() {
  struct Made {
    std::string path = "/dev/shm/fakecuda-XXXXXX";
    Made() {
      if (::mkdtemp(path.data()) == nullptr) std::abort();
      ::setenv("FAKECUDA_DIR", path.c_str(), 1);
    }
    ~Made() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static const Made kMade;
  return kMade.path;
}

class FakeCuda : public ::testing::Test {
 protected:
  using Settings = std::map<std::string, std::string>;

  void SetUp() override {
    directory();
    ASSERT_EQ(cuda().cuInit(0), CUDA_SUCCESS);
    cuda().control.recover();
    violations();
    configure({});
    for (int device = 0; device < 2; ++device)
      MUST(cuda().cuDevicePrimaryCtxRetain(&contexts_[device], device));
    MUST(cuda().cuCtxPushCurrent(contexts_[0]));
  }

  void TearDown() override {
    EXPECT_EQ(violations(), "");
    for (const char* held :
         {"allocations", "imports", "allocation_handles", "reservations", "mappings",
          "pinned_ranges", "streams", "events", "modules", "pending_operations", "device_bytes"})
      EXPECT_EQ(cuda().control.gauge(held), 0U) << held;
    CUcontext popped = nullptr;
    cuda().cuCtxPopCurrent(&popped);
    for (int device = 0; device < 2; ++device) cuda().cuDevicePrimaryCtxRelease(device);
    EXPECT_EQ(cuda().control.gauge("contexts"), 0U);
    configure({});
  }

  /// The environment from now on: FAKECUDA_<key>=<value>, and nothing else of that kind.
  static void configure(const Settings& settings) {
    static std::vector<std::string> set;
    for (const std::string& name : set) ::unsetenv(name.c_str());
    set.clear();
    for (const auto& [key, value] : settings) {
      set.push_back("FAKECUDA_" + key);
      ::setenv(set.back().c_str(), value.c_str(), 1);
    }
    cuda().control.reload();
  }

  /// The text of all violations since the last look; they are forgotten.
  static std::string violations() {
    char text[4096];
    cuda().control.take_violations(text, sizeof text);
    return text;
  }
  static bool violated(const std::string& words) {
    const std::string text = violations();
    if (text.find(words) != std::string::npos) return true;
    ADD_FAILURE() << "no violation \"" << words << "\" but: \"" << text << '"';
    return false;
  }

  static CUstream make_stream() {
    CUstream stream = nullptr;
    EXPECT_EQ(cuda().cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), CUDA_SUCCESS);
    return stream;
  }
  static CUevent make_event(unsigned int flags = CU_EVENT_DISABLE_TIMING) {
    CUevent event = nullptr;
    EXPECT_EQ(cuda().cuEventCreate(&event, flags), CUDA_SUCCESS);
    return event;
  }
  static CUdeviceptr allocate(std::size_t bytes) {
    CUdeviceptr pointer = 0;
    EXPECT_EQ(cuda().cuMemAlloc(&pointer, bytes), CUDA_SUCCESS);
    return pointer;
  }

  /// Pinned bytes, gone with the object.
  class Pinned {
   public:
    explicit Pinned(std::size_t bytes, unsigned char value = 0) : bytes_(bytes) {
      void* memory = nullptr;
      EXPECT_EQ(cuda().cuMemHostAlloc(&memory, bytes, 0), CUDA_SUCCESS);
      data_ = static_cast<unsigned char*>(memory);
      std::memset(data_, value, bytes);
    }
    ~Pinned() { EXPECT_EQ(cuda().cuMemFreeHost(data_), CUDA_SUCCESS); }
    Pinned(const Pinned&) = delete;
    Pinned& operator=(const Pinned&) = delete;
    [[nodiscard]] unsigned char* data() { return data_; }
    [[nodiscard]] CUdeviceptr address() { return reinterpret_cast<CUdeviceptr>(data_); }
    /// Whether all bytes are this one.
    [[nodiscard]] bool is_all(unsigned char value) const {
      for (std::size_t i = 0; i < bytes_; ++i) {
        if (data_[i] != value) return false;
      }
      return true;
    }

   private:
    unsigned char* data_ = nullptr;
    std::size_t bytes_;
  };

  static bool device_is_all(CUdeviceptr pointer, std::size_t bytes, unsigned char value) {
    std::vector<unsigned char> read(bytes);
    EXPECT_EQ(cuda().cuMemcpyDtoH(read.data(), pointer, bytes), CUDA_SUCCESS);
    return read == std::vector<unsigned char>(bytes, value);
  }

  CUcontext contexts_[2] = {};
};

}  // namespace fakecuda::test
