// What one refit costs the daemon in allocations, faults, system calls, yields and opens. Times are
// thrown away here.
//
// Entered by the orchestrating thread. Must not be used on a daemon whose times count.
#include <filesystem>

#include "bench.hpp"
#include "counters.hpp"

namespace refit::bench {
namespace {

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

/// A run of N refits is subtracted from one of 2N, so that attaching and what happens once cancel
/// out.
Result<void> count_traced(Bench& bench, Pair& pair, const Daemon& daemon, const std::string& size,
                          int refits) {
  auto strace = find_strace();
  if (!strace) {
    bench.skip("syscalls_per_refit." + size, strace.error().message);
    bench.skip("opens_per_refit." + size, strace.error().message);
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
    bench.skip("syscalls_per_refit." + size, twice.error().message);
    bench.skip("opens_per_refit." + size, twice.error().message);
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

}  // namespace

Result<void> count_per_refit(Bench& bench, Pair& pair, const std::string& size, int refits,
                             int traced_refits) {
  const std::string library =
      std::filesystem::path(own_path()).parent_path().string() + "/librefit_bench_alloc_counter.so";
  const bool can_preload = std::filesystem::exists(library);
  if (!can_preload) bench.skip("allocations_per_refit." + size, "'" + library + "' was not built");

  REFIT_TRY_ASSIGN(const AllocationCounter allocations, AllocationCounter::make(bench.directory));
  DaemonOptions options{bench.options.refitd};
  if (can_preload) {
    options.environment = {{"LD_PRELOAD", library},
                           {"REFIT_BENCH_ALLOCATIONS", allocations.path()}};
  }
  REFIT_TRY_ASSIGN(Daemon daemon, Daemon::start(options, bench.directory));
  REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
  REFIT_TRY(pair.refits(bench.times(10, 3)));

  const std::uint64_t allocations_before = allocations.value();
  REFIT_TRY_ASSIGN(const std::uint64_t faults_before, page_faults(daemon.pid()));
  REFIT_TRY(pair.refits(refits));
  REFIT_TRY_ASSIGN(const std::uint64_t faults_after, page_faults(daemon.pid()));
  const std::uint64_t allocations_after = allocations.value();
  bench.figures["page_faults_per_refit"][size] =
      static_cast<double>(faults_after - faults_before) / refits;
  if (can_preload) {
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

}  // namespace refit::bench
