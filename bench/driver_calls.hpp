// The file that driver_counter.cpp counts in and the bench reads: one entry for each of the
// driver's functions that the counted process may call.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace refit::bench {

struct DriverCalls {
  static constexpr const char* kVariable = "REFIT_BENCH_DRIVER_CALLS";
  static constexpr std::size_t kEntriesMax = 128;
  struct Entry {
    char name[56];  ///< the driver's name of it; two ABIs of one function have two entries
    std::atomic<std::uint64_t> count;
  };
  Entry entries[kEntriesMax];  ///< the first without a name ends them
};

}  // namespace refit::bench
