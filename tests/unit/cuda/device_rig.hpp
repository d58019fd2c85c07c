// What a scenario on the fake driver needs: two devices, memory on each side, other parties'
// streams and events. Test functions of the driver that refit itself has no use for are found by
// dlsym.
//
// A scenario is a process of its own: the driver is loaded once per process, and so are REFIT_POINT
// and the fake's settings.
#pragma once

#include <cuda.h>
#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "memory/cuda/device_copier.hpp"
#include "support/fake_cuda/fake_cuda.hpp"

namespace refit::cuda::test {

using Buffer = std::vector<std::byte>;

inline Buffer numbered(std::size_t bytes, unsigned seed) {
  Buffer buffer(bytes);
  std::uint32_t state = seed * 2654435761U + 1;
  for (std::byte& byte : buffer) {
    state = state * 1664525U + 1013904223U;
    byte = static_cast<std::byte>(state >> 24);
  }
  return buffer;
}

/// Ends the scenario: nothing that follows would mean anything.
inline void must(bool condition, const std::string& what) {
  if (condition) return;
  std::printf("scenario broken: %s\n", what.c_str());
  std::fflush(stdout);
  std::_Exit(3);
}

template <typename T>
T must(Result<T> result) {
  must(result.has_value(), result ? "" : result.error().to_string());
  return std::move(*result);
}

class Rig {
 public:
  Rig() {
    void* library = ::dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    must(library != nullptr, "no libcuda.so.1 is loaded");
    const auto control = fakecuda::Control::of(library);
    must(control.has_value(), "libcuda.so.1 is not the fake");
    fake = *control;
    bind(library, "cuMemAlloc_v2", alloc_);
    bind(library, "cuMemFree_v2", free_);
    bind(library, "cuMemcpyHtoD_v2", to_device_);
    bind(library, "cuMemcpyDtoH_v2", to_host_);
    bind(library, "cuMemsetD8Async", memset_async);
    for (const Device& device : devices->all()) contexts.push_back(must(devices->context(device)));
  }
  ~Rig() { fake.set_faults(""); }

  [[nodiscard]] std::unique_ptr<DeviceCopier> copier() const {
    return must(DeviceCopier::create(devices));
  }
  /// Of host memory: any.
  [[nodiscard]] Current enter(CUdevice device) const {
    return must(Current::enter(*contexts[device < 0 ? 0 : static_cast<std::size_t>(device)]));
  }

  /// All that is queued by anybody.
  void finish_everything() const {
    for (const auto& context : contexts) {
      const auto current = Current::enter(*context);
      driver.ctx_synchronize();
    }
  }

  std::shared_ptr<VisibleDevices> devices = must(VisibleDevices::open());
  const Driver& driver = devices->driver();
  std::vector<std::shared_ptr<const Context>> contexts;
  fakecuda::Control fake;
  decltype(&cuMemsetD8Async) memset_async = nullptr;

 private:
  friend class Memory;
  template <typename Function>
  static void bind(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    must(function != nullptr, name);
  }
  decltype(&cuMemAlloc) alloc_ = nullptr;
  decltype(&cuMemFree) free_ = nullptr;
  decltype(&cuMemcpyHtoD) to_device_ = nullptr;
  decltype(&cuMemcpyDtoH) to_host_ = nullptr;
};

/// Device memory, or pinned host memory.
class Memory {
 public:
  Memory(const Rig& rig, CUdevice device, std::size_t bytes) : rig_(rig), bytes_(bytes) {
    const Current current = rig.enter(device);
    end.device = device;
    if (!end.is_host()) {
      must(rig.alloc_(&end.address, bytes) == CUDA_SUCCESS, "cuMemAlloc");
      return;
    }
    host_ = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(host_ != MAP_FAILED, "mmap");
    must(rig.driver.mem_host_register(host_, bytes, CU_MEMHOSTREGISTER_PORTABLE) == CUDA_SUCCESS,
         "cuMemHostRegister");
    end.address = reinterpret_cast<CUdeviceptr>(host_);
  }
  ~Memory() {
    const Current current = rig_.enter(end.device);
    if (!end.is_host()) {
      rig_.free_(end.address);
      return;
    }
    rig_.driver.mem_host_unregister(host_);
    ::munmap(host_, bytes_);
  }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  /// Blocks, and touches no stream.
  void set(const Buffer& bytes) {
    const Current current = rig_.enter(end.device);
    if (end.is_host()) {
      std::memcpy(host_, bytes.data(), bytes.size());
    } else {
      must(rig_.to_device_(end.address, bytes.data(), bytes.size()) == CUDA_SUCCESS, "HtoD");
    }
  }
  [[nodiscard]] Buffer get() const {
    const Current current = rig_.enter(end.device);
    Buffer bytes(bytes_);
    if (end.is_host()) {
      std::memcpy(bytes.data(), host_, bytes_);
    } else {
      must(rig_.to_host_(bytes.data(), end.address, bytes_) == CUDA_SUCCESS, "DtoH");
    }
    return bytes;
  }
  [[nodiscard]] CopyEnd at(std::uint64_t offset) const {
    return {end.address + offset, end.device};
  }
  [[nodiscard]] std::span<std::byte> host() const {
    return {static_cast<std::byte*>(host_), bytes_};
  }

  CopyEnd end;

 private:
  const Rig& rig_;
  std::size_t bytes_;
  void* host_ = nullptr;
};

/// A stream of somebody else, and an event behind what it was given to do.
class Party {
 public:
  Party(const Rig& rig, CUdevice device) : rig_(rig), device_(device) {
    const Current current = rig.enter(device);
    must(rig.driver.stream_create(&stream_, CU_STREAM_NON_BLOCKING) == CUDA_SUCCESS, "stream");
    must(rig.driver.event_create(&event, CU_EVENT_DISABLE_TIMING) == CUDA_SUCCESS, "event");
  }
  ~Party() {
    const Current current = rig_.enter(device_);
    rig_.driver.stream_synchronize(stream_);
    rig_.driver.event_destroy(event);
    rig_.driver.stream_destroy(stream_);
  }
  Party(const Party&) = delete;
  Party& operator=(const Party&) = delete;

  void fill(const CopyEnd& target, unsigned char value, std::size_t bytes) {
    const Current current = rig_.enter(device_);
    must(rig_.memset_async(target.address, value, bytes, stream_) == CUDA_SUCCESS, "memset");
    must(rig_.driver.event_record(event, stream_) == CUDA_SUCCESS, "record");
  }

  CUevent event = nullptr;

 private:
  const Rig& rig_;
  CUdevice device_;
  CUstream stream_ = nullptr;
};

/// Counts what is done, and keeps the last outcome.
class Completion {
 public:
  explicit Completion(DeviceCopyJob& job) {
    job.on_done(
        [](void* context, DeviceCopyOutcome outcome) {
          auto& self = *static_cast<Completion*>(context);
          const std::lock_guard lock(self.mutex_);
          self.outcome_ = outcome;
          ++self.count_;
          self.changed_.notify_all();
        },
        this);
  }
  DeviceCopyOutcome wait_for(unsigned count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return count_ >= count; });
    EXPECT_EQ(count_, count);
    return outcome_;
  }
  [[nodiscard]] unsigned count() {
    const std::lock_guard lock(mutex_);
    return count_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  unsigned count_ = 0;
  DeviceCopyOutcome outcome_;
};

inline DeviceCopyOutcome run(DeviceCopier& copier, DeviceCopyJob& job) {
  Completion completion(job);
  copier.submit(job);
  return completion.wait_for(1);
}

}  // namespace refit::cuda::test
