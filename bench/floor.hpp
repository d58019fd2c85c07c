// The floor of every figure: the fastest plain copy of the same bytes that this machine offers, and
// for what only reads them the fastest reading.
//
// One CopyTeam per process, driven by one thread; its workers are pinned to distinct cores and
// sleep between copies. It shares no code with the daemon's copy, so that it cannot share its
// faults. Knows nothing of tensors.
#pragma once

#include <sched.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "stats.hpp"

namespace refit::bench {

/// The `ahead` kinds prefetch 2 KiB ahead of their loads.
enum class CopyKind {
  memcpy,
  stream_avx512,
  stream_avx512_ahead,
  stream_avx2,
  stream_avx2_ahead,
  rep_movsb
};

/// One way to copy: the instruction, how many threads, and whether each takes one contiguous share
/// or the next free chunk of 4 MiB.
struct CopyMethod {
  CopyKind kind = CopyKind::memcpy;
  std::size_t threads = 1;
  bool chunks = false;

  [[nodiscard]] std::string to_string() const;
};

/// The cores that this process may run on, in order.
[[nodiscard]] std::vector<int> allowed_cores();
/// The set that holds `core` alone.
[[nodiscard]] cpu_set_t only_core(int core) noexcept;

class CopyTeam {
 public:
  CopyTeam();
  ~CopyTeam();
  CopyTeam(const CopyTeam&) = delete;
  CopyTeam& operator=(const CopyTeam&) = delete;

  /// Copies `bytes`, visible to the caller when it returns, and says how many seconds it took.
  double copy(const CopyMethod& method, std::byte* to, const std::byte* from, std::size_t bytes);

  struct Calibration {
    CopyMethod winner;
    double best_s = 0;  ///< the shortest copy seen
    std::vector<std::pair<std::string, double>> medians_s;
  };
  /// Tries every method of this machine on these very bytes, `rounds` times in turn; those that are
  /// far behind after the first round are not tried again.
  Calibration calibrate(std::byte* to, const std::byte* from, std::size_t bytes, int rounds);

 private:
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

/// Reads every line of these bytes on all cores: one after the other, the same with a prefetch 2
/// KiB ahead, and four pages at once. The seconds that the fastest of the three took.
[[nodiscard]] double read_all(const std::byte* data, std::size_t bytes);

/// Runs `work(index)` for every index below `count` on all cores, in order of index, and returns
/// when all are done.
void on_all_cores(std::size_t count, const std::function<void(std::size_t)>& work);

}  // namespace refit::bench
