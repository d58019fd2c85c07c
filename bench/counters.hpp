// What the kernel and preloaded libraries say about a process: faults, memory, system calls,
// allocations, calls of the CUDA driver.
//
// Entered by the orchestrating thread. Reads /proc and drives strace; asks the measured process
// nothing.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <map>
#include <string>

#include "process.hpp"
#include "refit/result.hpp"

namespace refit::bench {

/// Bytes that the kernel thinks can still be had without swapping.
[[nodiscard]] std::uint64_t memory_available_bytes();

/// Minor plus major faults of all threads so far.
[[nodiscard]] Result<std::uint64_t> page_faults(pid_t pid);

struct MemoryUse {
  double private_mib = 0;  ///< private pages of everything that is not a memfd
  double session_mib = 0;  ///< the daemon's own memfds: rings and arenas of sessions
  double page_tables_mib = 0;
  std::uint64_t tensor_bytes = 0;       ///< of the clients' tensor memory, mapped
  std::uint64_t tensor_page_bytes = 0;  ///< the page size behind most of the clients' tensor memory
  double tensor_huge_fraction = 0;
};
/// `tensor_label` is what the bench calls its tensor memory.
[[nodiscard]] Result<MemoryUse> memory_use(pid_t pid, const std::string& tensor_label);

/// Pins every thread of `pid` to `core`.
[[nodiscard]] Result<void> pin_all_threads(pid_t pid, int core);

/// A file that a preloaded library counts in.
class CounterFile {
 public:
  static Result<CounterFile> make(const TemporaryDirectory& directory, std::size_t bytes);
  ~CounterFile();
  CounterFile(CounterFile&& other) noexcept
      : path_(std::move(other.path_)),
        page_(std::exchange(other.page_, nullptr)),
        bytes_(other.bytes_) {}
  CounterFile& operator=(CounterFile&&) = delete;
  [[nodiscard]] const std::string& path() const noexcept { return path_; }
  [[nodiscard]] const void* data() const noexcept { return page_; }

 private:
  CounterFile(std::string path, void* page, std::size_t bytes)
      : path_(std::move(path)), page_(page), bytes_(bytes) {}
  std::string path_;
  void* page_;
  std::size_t bytes_;
};

/// What alloc_counter.cpp has counted in a file of one word.
[[nodiscard]] std::uint64_t allocations_in(const CounterFile& file);

using CallCounts = std::map<std::string, std::uint64_t>;

/// What driver_counter.cpp has counted in a file of a DriverCalls, by the driver's names.
[[nodiscard]] CallCounts driver_calls_in(const CounterFile& file);

/// The path of strace; Errc::unsupported with what to install if there is none.
[[nodiscard]] Result<std::string> find_strace();

/// System calls of all threads of `pid` while `action` runs, by attaching `strace -f -c`.
[[nodiscard]] Result<CallCounts> count_syscalls(const std::string& strace, pid_t pid,
                                                const TemporaryDirectory& directory,
                                                const std::function<Result<void>()>& action);

}  // namespace refit::bench
