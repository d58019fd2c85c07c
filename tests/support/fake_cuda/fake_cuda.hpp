// What a test may ask of the fake CUDA driver, from within the process that loaded it or from
// another one.
//
// The driver itself is the libcuda.so.1 that the build puts into tests/support/fake_cuda/; a
// program finds it through LD_LIBRARY_PATH or by its path, as it would find the real one. Nothing
// here needs cuda.h. Its behaviour is chosen by the environment, read at cuInit:
//
//   FAKECUDA_DIR                directory (tmpfs) that the fixture makes; all processes that share
//                               devices name the same. Without it cuInit fails with 304.
//   FAKECUDA_DRIVER_VERSION     13000; 12080 has the first ABI of the batch copy only, 12000 none
//   FAKECUDA_SEED               0; decides every draw below
//   FAKECUDA_ROLE               mixed into the draws: the processes of one test differ by it
//   FAKECUDA_SCHEDULE           lazy (default), eager, mixed (drawn for each stream), or a pattern
//                               for the streams in the order of their creation: "eager,lazy"
//   FAKECUDA_DEVICES            2
//   FAKECUDA_DEVICE_<i>         "memory=16G,compute_mode=3,ipc=0,vmm=0,granularity=64K,cc=80,
//                               peers=0,read_only_register=0,pools=0"
//   CUDA_VISIBLE_DEVICES        indices and "GPU-<uuid>", as for the real driver
//   FAKECUDA_ABSENT_DEVICES     indices without a device node: hidden, and importing their memory
//                               fails with 101
//   FAKECUDA_HOST_REGISTER_MAX  512G; one cuMemHostRegister of this or more fails
//   FAKECUDA_FOREIGN_UID        "allow" lets legacy handles be opened across uids
//   FAKECUDA_EXPORTER_DEATH     what an importer finds in legacy memory of a dead exporter:
//                               poison (default), keep, fault (sticky 700)
//   FAKECUDA_REUSE_ADDRESSES    1 hands freed addresses out again
//   FAKECUDA_FAULT              see fakecuda_set_faults below
//   FAKECUDA_KERNELS            shared object with `const FakeCudaKernel* fakecuda_kernels()`
//   FAKECUDA_ON_VIOLATION       exit (default: exit code kBadExit), abort (at once), ignore
//   FAKECUDA_ON_LEAK            exit (default), ignore
//
// It proves how a program uses the driver, and is no GPU. Two differences matter to a test: the
// device of a stopped process stops with it, where hardware goes on; and an error that is injected
// into a waiting call leaves the work undone, where on hardware the device would be lost (kind
// "later" does that).
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>

namespace fakecuda {

/// The exit code of a process that would have ended with 0 but misused the driver or leaked.
inline constexpr int kBadExit = 86;

/// What a process holds now. The names are those of fakecuda_gauge().
enum class Gauge : std::size_t {
  device_bytes,
  pinned_bytes,
  allocations,         ///< of cuMemAlloc, cuMemAllocAsync and cuMemAllocManaged
  imports,             ///< legacy allocations of other processes
  allocation_handles,  ///< VMM: created, imported or retained, and not released
  reservations,
  mappings,
  pinned_ranges,
  contexts,
  streams,
  events,
  modules,
  pending_operations,
  count
};
inline constexpr const char* kGaugeNames[] = {
    "device_bytes", "pinned_bytes", "allocations",       "imports",  "allocation_handles",
    "reservations", "mappings",     "pinned_ranges",     "contexts", "streams",
    "events",       "modules",      "pending_operations"};

/// What has happened in a process so far.
enum class Tally : std::size_t {
  violations,
  faults,          ///< injected failures that struck
  operations,      ///< of streams, that have run
  orphaned_waits,  ///< released because the process that was to record the event died
  leaks,           ///< found at exit
  count
};
inline constexpr const char* kTallyNames[] = {"violations", "faults", "operations",
                                              "orphaned_waits", "leaks"};

inline constexpr std::size_t kDevicesMax = 16;
inline constexpr std::size_t kEntriesMax = 256;

/// The file FAKECUDA_DIR/p-<pid>, mapped by its process. It stays when the process ends.
struct ProcessPage {
  static constexpr std::uint64_t kMagic = 0x5072'6f63'4661'6b65;
  struct Calls {
    char name[40];    ///< the name that cuGetProcAddress is asked for
    char symbol[40];  ///< the name of the exported symbol
    std::atomic<std::uint64_t> count;
  };

  std::uint64_t magic;
  std::uint64_t instance;  ///< tells two processes apart that had the same pid
  std::int64_t pid;
  std::atomic<std::uint64_t> gauges[static_cast<std::size_t>(Gauge::count)];
  std::atomic<std::uint64_t> tallies[static_cast<std::size_t>(Tally::count)];
  std::atomic<std::uint64_t> device_bytes[kDevicesMax];  ///< by physical index
  std::atomic<std::uint64_t> contexts[kDevicesMax];      ///< 1 where the primary context is active
  Calls calls[kEntriesMax];
  std::atomic<std::uint64_t> text_bytes;
  char text[16 * 1024];  ///< one line for each violation, cut when full

  [[nodiscard]] std::uint64_t gauge(Gauge which) const {
    return gauges[static_cast<std::size_t>(which)].load();
  }
  [[nodiscard]] std::uint64_t tally(Tally which) const {
    return tallies[static_cast<std::size_t>(which)].load();
  }
  /// Of every entry that has this name or symbol; of all if it is empty.
  [[nodiscard]] std::uint64_t calls_of(std::string_view name) const {
    std::uint64_t sum = 0;
    for (const Calls& entry : calls) {
      if (entry.name[0] == '\0') break;
      if (name.empty() || name == entry.name || name == entry.symbol) sum += entry.count.load();
    }
    return sum;
  }
  [[nodiscard]] std::string violations() const { return {text, text_bytes.load()}; }
};

/// The page of another process, alive or not. Its numbers change while they are read.
class ProcessReport {
 public:
  static std::optional<ProcessReport> open(const std::string& directory, pid_t pid) {
    const std::string path = directory + "/p-" + std::to_string(pid);
    const int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return std::nullopt;
    void* bytes = ::mmap(nullptr, sizeof(ProcessPage), PROT_READ, MAP_SHARED, fd, 0);
    ::close(fd);
    if (bytes == MAP_FAILED) return std::nullopt;
    ProcessReport report(static_cast<const ProcessPage*>(bytes));
    if (report.page_->magic != ProcessPage::kMagic) return std::nullopt;
    return report;
  }
  ~ProcessReport() {
    if (page_ != nullptr) ::munmap(const_cast<ProcessPage*>(page_), sizeof(ProcessPage));
  }
  ProcessReport(ProcessReport&& other) noexcept : page_(other.page_) { other.page_ = nullptr; }
  ProcessReport& operator=(ProcessReport&&) = delete;
  const ProcessPage* operator->() const { return page_; }

 private:
  explicit ProcessReport(const ProcessPage* page) : page_(page) {}
  const ProcessPage* page_;
};

}  // namespace fakecuda

extern "C" {

struct FakeCudaLaunch {
  unsigned int grid[3];
  unsigned int block[3];
  void* const* parameters;  ///< copies of the values, taken at launch
  /// The CPU's view of device memory. Null, and an illegal address on the device, if the kernel may
  /// not touch all of it.
  void* (*bytes)(std::uint64_t device_pointer, std::size_t bytes, int write);
};

/// A kernel that runs on the CPU in place of the one with this name in a fatbin.
struct FakeCudaKernel {
  const char* name;
  const std::size_t* parameter_bytes;
  std::size_t parameter_count;
  /// The whole grid. Device pointers among the parameters go through launch->bytes.
  void (*run)(const FakeCudaLaunch* launch);
  const FakeCudaKernel* next;  ///< of the table in FAKECUDA_KERNELS; the last has nullptr
};

/// Adds to the table of kernels. The object must stay.
void fakecuda_register_kernel(const FakeCudaKernel* kernel);

/// Replaces what is left of the faults. Several are separated by ';', each is
///   [name]#k=code[:kind]   the k-th call from now, of that name or of all
///   name=code[:kind]       every call of that name
/// kind: refuse (default: nothing is done), after (done, and the code returned nevertheless),
/// later (success; from the next synchronising call on everything returns the code).
/// Returns 0, or -1 if it cannot be read, and then nothing is changed.
int fakecuda_set_faults(const char* faults);

/// Calls so far by name or symbol; of all for null.
std::uint64_t fakecuda_calls(const char* name);

/// A Gauge or Tally by its name; ~0 if there is none.
std::uint64_t fakecuda_gauge(const char* name);

/// Returns the number of violations so far, copies their text, and forgets them.
std::uint64_t fakecuda_take_violations(char* text, std::size_t text_bytes);

/// Makes a lost device usable again and forgets all pending work: for tests of one process that
/// lose it on purpose, where hardware would need a new process.
void fakecuda_recover(void);

/// Reads seed, role, schedule, faults and limits from the environment again and counts streams
/// from 0. Devices, version and directory stay.
void fakecuda_reload(void);

}  // extern "C"

namespace fakecuda {

/// The functions above, of a driver that was loaded with dlopen.
struct Control {
  decltype(&fakecuda_register_kernel) register_kernel = nullptr;
  decltype(&fakecuda_set_faults) set_faults = nullptr;
  decltype(&fakecuda_calls) calls = nullptr;
  decltype(&fakecuda_gauge) gauge = nullptr;
  decltype(&fakecuda_take_violations) take_violations = nullptr;
  decltype(&fakecuda_recover) recover = nullptr;
  decltype(&fakecuda_reload) reload = nullptr;

  /// Nothing if `library` is not the fake.
  static std::optional<Control> of(void* library) {
    Control control;
    const bool found = bind(library, "fakecuda_register_kernel", control.register_kernel) &&
                       bind(library, "fakecuda_set_faults", control.set_faults) &&
                       bind(library, "fakecuda_calls", control.calls) &&
                       bind(library, "fakecuda_gauge", control.gauge) &&
                       bind(library, "fakecuda_take_violations", control.take_violations) &&
                       bind(library, "fakecuda_recover", control.recover) &&
                       bind(library, "fakecuda_reload", control.reload);
    return found ? std::optional(control) : std::nullopt;
  }

 private:
  template <typename Function>
  static bool bind(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(::dlsym(library, name));
    return function != nullptr;
  }
};

}  // namespace fakecuda
