// Driver: all state of the fake in this process, and its one lock.
//
// Every entry holds the lock from its first to its last line, but where it waits. The worker
// thread holds it while it runs what another process asked for. The object is never destroyed:
// threads may still be in a call when the process ends.
#pragma once

#include <cuda.h>

#include <array>
#include <atomic>
#include <initializer_list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <tl/expected.hpp>
#include <vector>

#include "support/fake_cuda/configuration.hpp"
#include "support/fake_cuda/draw.hpp"
#include "support/fake_cuda/engine.hpp"
#include "support/fake_cuda/faults.hpp"
#include "support/fake_cuda/handles.hpp"
#include "support/fake_cuda/memory.hpp"
#include "support/fake_cuda/process.hpp"

namespace fakecuda {

/// The primary context of a device.
struct Context {
  int device = 0;  ///< physical index
  unsigned int retained = 0;
  unsigned int flags = 0;
  std::array<bool, kDevicesMax> peers{};  ///< that it enabled access to

  [[nodiscard]] CUcontext handle() const {
    return reinterpret_cast<CUcontext>(0xc0'0000'0000 +
                                       16 * (static_cast<std::uint64_t>(device) + 1));
  }
};

/// What cuMemCreate made or cuMemImportFromShareableHandle found.
struct PhysicalMemory {
  std::shared_ptr<Backing> backing;
  unsigned int references = 0;  ///< each needs its own cuMemRelease
  CUmemAllocationProp properties{};
  bool created_here = false;  ///< and counted as memory of this process
};

/// Addresses of cuMemAddressReserve.
struct Reservation {
  std::uint64_t bytes = 0;
};

struct Module;    // kernels.hpp
struct Function;  // kernels.hpp

struct Driver {
  Driver();

  std::mutex mutex;
  std::atomic<std::int64_t> initialised_pid{0};
  Configuration configuration;
  Process process;
  Doorbell doorbell;
  Faults faults;
  Arena arena;
  Ranges ranges;
  Engine engine{*this};
  std::array<Context, kDevicesMax> contexts;
  Handles<CUstream, Stream> streams{0x5a};
  Handles<CUevent, Event> events{0xee};
  Handles<CUmodule, Module> modules{0x30};
  Handles<CUfunction, const Function> functions{0xf0};
  /// By handle. A released one stays while it is mapped: retaining the mapping brings it back.
  std::map<std::uint64_t, PhysicalMemory> memories;
  std::map<std::uint64_t, Reservation> reservations;
  std::uint64_t last_physical = 0;
  std::uint64_t last_file = 0;
  std::uint64_t last_choice = 0;
  std::uint64_t last_access = 0;         ///< grows with everything that reads or writes memory
  CUresult sticky = CUDA_SUCCESS;        ///< what every call that works on a device returns
  CUresult sticky_later = CUDA_SUCCESS;  ///< becomes `sticky` at the next synchronisation
  bool leaks_excused = false;  ///< an injected failure made it impossible to give all back
  std::thread worker;
  std::atomic<bool> stopping{false};

  CUresult start();
  /// Those of the environment, the first time.
  void load_faults();
  /// The context on top of the calling thread's stack, or null.
  static Context* current();
  [[nodiscard]] const DeviceSettings& device(int physical) const {
    return configuration.devices[static_cast<std::size_t>(physical)];
  }
  [[nodiscard]] Context* find_context(CUcontext handle);
  [[nodiscard]] std::optional<int> physical_of(CUdevice ordinal) const;
  /// CU_DEVICE_INVALID for a device that this process does not see.
  [[nodiscard]] CUdevice ordinal_of(int physical) const;

  [[nodiscard]] Draw draw(std::string_view purpose, std::uint64_t number) const {
    return {configuration.seed, configuration.role, purpose, number};
  }
  /// One of several codes where the documentation does not say which: nobody may rely on one.
  CUresult one_of(std::initializer_list<CUresult> codes);

  void violation(const std::string& description) { process.violation(description); }
  /// The device is lost: `code` from now on.
  void fail_device(CUresult code, const std::string& description);
  /// Whether the device has room for them.
  [[nodiscard]] bool fits(int physical, std::uint64_t bytes) const;
  /// Counts bytes of a device that this process holds.
  void account(int physical, std::uint64_t bytes) {
    process.page().device_bytes[static_cast<std::size_t>(physical)].fetch_add(bytes);
  }
  void account_back(int physical, std::uint64_t bytes) {
    process.page().device_bytes[static_cast<std::size_t>(physical)].fetch_sub(bytes);
  }
  /// The file of an allocation ("m-") or an event ("e-").
  [[nodiscard]] std::string file_path(const char* prefix, ProcessId owner,
                                      std::uint64_t number) const;
  /// The stream that work may be given to now, or why it may not.
  tl::expected<std::shared_ptr<Stream>, CUresult> usable_stream(CUstream handle);
  /// Where the CPU finds these bytes, for work that `device` does now. Null, and the device is
  /// lost, if it may not touch all of them.
  std::byte* touch(std::uint64_t address, std::uint64_t bytes, bool write, int device);
  /// Ends an allocation or an import; what other processes hold of it is none of its business.
  void release_range(std::uint64_t base);
  /// To be called where errors of earlier work surface; the result is what to return.
  CUresult surface();
  /// Releases the lock until the doorbell may have rung.
  void wait(std::uint32_t observed, bool may_die);

  void publish_gauges();
  /// One line for each kind of thing that is still held.
  [[nodiscard]] std::string leaks();
  void stop();

 private:
  bool faults_loaded_ = false;
  void work();
  void look_at_exporter(Range& range);
};

Driver& driver();

}  // namespace fakecuda
