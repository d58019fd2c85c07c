// What one refit costs the daemon in allocations, faults, system calls, yields, opens and calls of
// the driver. Times are thrown away here.
//
// Entered by the orchestrating thread. Must not be used on a daemon whose times count.
#include <filesystem>
#include <optional>

#include "bench.hpp"
#include "counters.hpp"
#include "driver_calls.hpp"

namespace refit::bench {
namespace {

/// A refit's own calls: those of its proof in the background come when they like.
const std::vector<std::string> kWithoutProof{"--proof-threads", "0"};

using nlohmann::ordered_json;

/// As alloc_counter.cpp reads it.
constexpr const char* kAllocationsVariable = "REFIT_BENCH_ALLOCATIONS";

const std::set<std::string> kYields{"sched_yield"};
const std::set<std::string> kOpens{"open",         "openat", "openat2",  "creat",
                                   "memfd_create", "socket", "eventfd2", "pidfd_open"};

double sum(const std::map<std::string, double>& per_refit, const std::set<std::string>& names,
           bool inside) {
  double total = 0;
  for (const auto& [name, count] : per_refit) {
    if ((names.count(name) != 0) == inside) total += count;
  }
  return total;
}

/// Every key of `names` was not measured at this size.
void skip_all(Bench& bench, const std::vector<std::string>& names, const std::string& size,
              const std::string& reason) {
  for (const std::string& name : names) bench.skip(name + "." + size, reason);
}

const std::vector<std::string> kDriverFigures{"driver_calls_per_refit", "driver_copies_per_refit",
                                              "driver_opens_per_refit"};

/// The path of one of the bench's libraries for LD_PRELOAD; nothing if this build has none.
std::optional<std::string> library_beside(const std::string& name) {
  const std::string path = std::filesystem::path(own_path()).parent_path().string() + "/" + name;
  return std::filesystem::exists(path) ? std::optional(path) : std::nullopt;
}

constexpr const char* kNotBuilt = "its counter is not part of this build";

/// A run of N refits is subtracted from one of 2N, so that attaching and what happens once cancel
/// out.
Result<void> count_traced(Bench& bench, Pair& pair, const Daemon& daemon, const std::string& size,
                          int refits) {
  const auto skip = [&](const std::string& reason) {
    skip_all(bench, {"syscalls_per_refit", "opens_per_refit"}, size, reason);
  };
  auto strace = find_strace();
  if (!strace) {
    skip(strace.error().message);
    return {};
  }
  const auto traced = [&](int count) {
    return count_syscalls(*strace, daemon.pid(), bench.directory, [&]() -> Result<void> {
      REFIT_TRY(pair.refits(count));
      return {};
    });
  };
  auto once = traced(refits);
  auto twice = once ? traced(2 * refits) : once;
  if (!twice) {
    if (twice.error().code != Errc::unsupported) return Unexpected(std::move(twice).error());
    skip(twice.error().message);
    return {};
  }
  std::map<std::string, double> per_refit;
  for (const auto& [name, count] : *twice) per_refit[name] += static_cast<double>(count);
  for (const auto& [name, count] : *once) per_refit[name] -= static_cast<double>(count);
  for (auto& [name, count] : per_refit) count /= refits;
  bench.figures["syscalls_per_refit"][size] = sum(per_refit, kYields, false);
  bench.figures["yields_per_refit"][size] = sum(per_refit, kYields, true);
  bench.figures["opens_per_refit"][size] = sum(per_refit, kOpens, true);
  for (const auto& [name, count] : per_refit) {
    if (count != 0) bench.figures["syscalls_by_name"][size][name] = count;
  }
  return {};
}

/// Whether a driver's function makes something, shares it or gives it back: all of that is done
/// when a module is registered, and none of it in a refit.
bool opens_something(const std::string& name) {
  for (const char* word : {"Alloc", "Free", "Create", "Destroy", "Open", "Close", "Import",
                           "Export", "Handle", "Map", "Reserve", "Retain", "Release", "Register"}) {
    if (name.find(word) != std::string::npos) return true;
  }
  return false;
}

Result<void> count_driver_calls(Bench& bench, Pair& pair, const std::string& size, int refits) {
  const auto library = library_beside("librefit_bench_driver_counter.so");
  if (!library) {
    skip_all(bench, kDriverFigures, size, kNotBuilt);
    return {};
  }
  REFIT_TRY_ASSIGN(const CounterFile file, CounterFile::make(bench.directory, sizeof(DriverCalls)));
  REFIT_TRY_ASSIGN(Daemon daemon,
                   Daemon::start({bench.options.refitd,
                                  "adaptive",
                                  {{"LD_PRELOAD", *library}, {DriverCalls::kVariable, file.path()}},
                                  kWithoutProof},
                                 bench.directory));
  REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
  REFIT_TRY(pair.refits(bench.times(10, 3)));
  const CallCounts before = driver_calls_in(file);
  REFIT_TRY(pair.refits(refits));
  const CallCounts after = driver_calls_in(file);
  REFIT_TRY(pair.detach());
  REFIT_TRY(daemon.stop());

  double all = 0, copies = 0, opens = 0;
  ordered_json by_name = ordered_json::object();
  for (const auto& [name, count] : after) {
    const double per_refit = static_cast<double>(count - before.at(name)) / refits;
    if (per_refit == 0) continue;
    by_name[name] = per_refit;
    all += per_refit;
    if (name.rfind("cuMemcpy", 0) == 0) copies += per_refit;
    if (opens_something(name)) opens += per_refit;
  }
  if (all == 0) {
    return fail(Errc::unsupported, "the preloaded counter saw no driver call at all in '" +
                                       bench.options.refitd + "': it counts nothing there");
  }
  bench.figures["driver_calls_per_refit"][size] = all;
  bench.figures["driver_copies_per_refit"][size] = copies;
  bench.figures["driver_opens_per_refit"][size] = opens;
  bench.figures["driver_calls_by_name"][size] = by_name;
  return {};
}

/// What the daemon asks of the kernel and of the heap.
Result<void> count_own(Bench& bench, Pair& pair, const std::string& size, int refits,
                       int traced_refits) {
  const auto library = library_beside("librefit_bench_alloc_counter.so");
  if (!library) skip_all(bench, {"allocations_per_refit"}, size, kNotBuilt);

  REFIT_TRY_ASSIGN(const CounterFile allocations,
                   CounterFile::make(bench.directory, sizeof(std::uint64_t)));
  DaemonOptions options{bench.options.refitd};
  options.arguments = kWithoutProof;
  if (library)
    options.environment = {{"LD_PRELOAD", *library}, {kAllocationsVariable, allocations.path()}};
  REFIT_TRY_ASSIGN(Daemon daemon, Daemon::start(options, bench.directory));
  REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
  REFIT_TRY(pair.refits(bench.times(10, 3)));

  const std::uint64_t allocations_before = allocations_in(allocations);
  REFIT_TRY_ASSIGN(const std::uint64_t faults_before, page_faults(daemon.pid()));
  REFIT_TRY(pair.refits(refits));
  REFIT_TRY_ASSIGN(const std::uint64_t faults_after, page_faults(daemon.pid()));
  const std::uint64_t allocations_after = allocations_in(allocations);
  bench.figures["page_faults_per_refit"][size] =
      static_cast<double>(faults_after - faults_before) / refits;
  if (library) {
    if (allocations_before == 0) {
      return fail(Errc::unsupported, "the preloaded counter saw no allocation at all in '" +
                                         bench.options.refitd + "': it counts nothing there");
    }
    bench.figures["allocations_per_refit"][size] =
        static_cast<double>(allocations_after - allocations_before) / refits;
  }
  REFIT_TRY(count_traced(bench, pair, daemon, size, traced_refits));
  REFIT_TRY(pair.detach());
  return daemon.stop();
}

}  // namespace

Result<void> count_per_refit(Bench& bench, Pair& pair, const std::string& size, int refits,
                             int traced_refits) {
  if (bench.fake_driver) {
    skip_all(bench,
             {"allocations_per_refit", "page_faults_per_refit", "syscalls_per_refit",
              "yields_per_refit", "opens_per_refit"},
             size, "the fake driver's own, inside the daemon, would be counted too");
  } else {
    REFIT_TRY(count_own(bench, pair, size, refits, traced_refits));
  }
  if (bench.on_devices()) return count_driver_calls(bench, pair, size, refits);
  skip_all(bench, kDriverFigures, size, "host memory is copied without a driver");
  return {};
}

}  // namespace refit::bench
