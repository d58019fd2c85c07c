// Figures at the model's own size: refits beside plain copies, fresh attaches, populating, checks,
// the daemon's memory.
//
// Entered by the orchestrating thread. Must not hold tensor memory itself: the roles do.
#include <algorithm>

#include "bench.hpp"
#include "counters.hpp"
#include "floor.hpp"
#include "roles.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr double kBytesPerGB = 1e9;

struct RefitsAndCopies {
  Samples refit_s, memcpy_s;
  int stepped_back = 0;

  void add(const Message& message) {
    stepped_back = message.body.at("stepped_back").get<int>();
    for (const double value : message.body.at("refit_s").get<Samples>()) refit_s.push_back(value);
    for (const double value : message.body.at("memcpy_s").get<Samples>()) memcpy_s.push_back(value);
  }
};

/// What both roles hold, the roles' own needs, and the daemon's.
std::uint64_t needed_bytes(const Bench& bench) {
  constexpr std::uint64_t kSlackBytes = std::uint64_t{768} << 20;
  const std::uint64_t source = layout_of(bench.model.source, false).bytes;
  const std::uint64_t target = layout_of(bench.model.target, false).bytes;
  std::uint64_t bytes = source + target + kSlackBytes;
  // Views of both in the trainer and of the target in the engine; the fake's devices are host
  // memory, too, and may hold resident layers besides.
  if (bench.on_devices()) bytes += target;
  if (bench.fake_driver) bytes += source + 2 * target;
  return bytes;
}

std::string in_gib(std::uint64_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f GiB", static_cast<double>(bytes) / (1ULL << 30));
  return text;
}

Result<double> calibrate(Bench& bench, Pair& pair) {
  bench.progress("calibration: every way to copy " + in_gib(bench.model.bytes) +
                 " between these pages");
  REFIT_TRY_ASSIGN(const Message message,
                   pair.trainer.call({{"command", "calibrate"}, {"rounds", bench.times(5, 2)}}));
  bench.figures["memcpy_s"] = {{"winner", message.body.at("winner")}};
  bench.figures["memcpy_methods_s"] = message.body.at("medians_s");
  bench.progress("fastest: " + message.body.at("winner").get<std::string>());
  return message.body.at("best_s").get<double>();
}

/// Fresh sessions every time: the daemon maps and populates anew, then copies for the first time.
Result<void> measure_attaches(Bench& bench, Pair& pair, const Daemon& daemon) {
  const int attaches = bench.times(10, 2);
  RefitsAndCopies first;
  Samples register_s, madvise_s;
  double populated_bytes = 0;
  for (int i = 0; i < attaches; ++i) {
    bench.progress("fresh attach " + std::to_string(i + 1) + " of " + std::to_string(attaches));
    if (i > 0) REFIT_TRY(pair.detach());
    REFIT_TRY_ASSIGN(const double seconds, pair.attach(daemon.socket(), "adaptive"));
    register_s.push_back(seconds);
    REFIT_TRY_ASSIGN(const Message pairs, pair.trainer.call({{"command", "pairs"}, {"count", 1}}));
    first.add(pairs);
    if (bench.on_devices()) continue;
    REFIT_TRY_ASSIGN(const Message populated, pair.trainer.call({{"command", "populate"}}));
    madvise_s.push_back(populated.body.at("seconds").get<double>());
    populated_bytes = populated.body.at("bytes").get<double>();
  }
  bench.figures["first_refit_over_memcpy"] = median(ratios(first.refit_s, first.memcpy_s));
  if (bench.on_devices()) {
    for (const char* key :
         {"populate_ms_per_GB", "populate_over_madvise", "populate_4k_over_madvise"})
      bench.skip(key, "it is of pages of host memory; run it with --memory host");
    return {};
  }

  const double metadata_s = (bench.figures.at("register_ms").get<double>() +
                             bench.figures.at("register_source_ms").get<double>()) /
                            1e3;
  Samples populate_s;
  for (const double seconds : register_s) populate_s.push_back(std::max(0.0, seconds - metadata_s));
  bench.figures["populate_ms_per_GB"] = median(populate_s) * 1e3 / (populated_bytes / kBytesPerGB);
  bench.figures["madvise_ms_per_GB"] = median(madvise_s) * 1e3 / (populated_bytes / kBytesPerGB);
  bench.figures["populate_over_madvise"] = median(ratios(populate_s, madvise_s));
  return {};
}

Result<void> measure_plain_pages(Bench& bench, Pair& pair) {
  const std::uint64_t bytes = std::min(bench.model.bytes, std::uint64_t{1} << 30);
  if (memory_available_bytes() < bytes * 3 / 2) {
    bench.skip("populate_4k_over_madvise", "needs " + in_gib(bytes * 3 / 2) + " more memory");
    return {};
  }
  bench.progress("populating " + in_gib(bytes) + " of 4 KiB pages");
  REFIT_TRY_ASSIGN(const Message message,
                   pair.trainer.call({{"command", "register_plain"}, {"bytes", bytes}}));
  const auto register_s = message.body.at("register_s").get<Samples>();
  const auto madvise_s = message.body.at("madvise_s").get<Samples>();
  bench.figures["populate_4k_ms_per_GB"] =
      median(register_s) * 1e3 / (message.body.at("bytes").get<double>() / kBytesPerGB);
  bench.figures["populate_4k_over_madvise"] = median(ratios(register_s, madvise_s));
  return {};
}

Result<void> measure_pairs(Bench& bench, Pair& pair, double best_s) {
  REFIT_TRY(pair.trainer.call({{"command", "pairs"}, {"count", bench.times(2, 1)}}));
  RefitsAndCopies all;
  constexpr int kPairsPerCall = 5;
  for (int done = 0; done < bench.options.steps; done += kPairsPerCall) {
    const int count = std::min(kPairsPerCall, bench.options.steps - done);
    REFIT_TRY_ASSIGN(const Message message,
                     pair.trainer.call({{"command", "pairs"}, {"count", count}}));
    all.add(message);
    char text[160];
    std::snprintf(text, sizeof text, "pairs %d of %d: refit %.1f ms, copy %.1f ms, ratio %.3f",
                  done + count, bench.options.steps, median(all.refit_s) * 1e3,
                  median(all.memcpy_s) * 1e3, median(ratios(all.refit_s, all.memcpy_s)));
    bench.progress(text);
  }
  const Samples pair_ratios = ratios(all.refit_s, all.memcpy_s);
  bench.figures["refit_s"] = {{"p50", percentile(all.refit_s, 50)},
                              {"p99", percentile(all.refit_s, 99)},
                              {"min", smallest(all.refit_s)},
                              {"max", largest(all.refit_s)}};
  bench.figures["memcpy_s"] = {{"p50", percentile(all.memcpy_s, 50)},
                               {"min", std::min(best_s, smallest(all.memcpy_s))},
                               {"winner", bench.figures["memcpy_s"]["winner"]}};
  bench.figures["refit_over_memcpy"] = median(pair_ratios);
  bench.figures["engine_stepped_back"] = all.stepped_back;
  bench.figures["refit_over_memcpy_pairs"] = {{"count", pair_ratios.size()},
                                              {"min", smallest(pair_ratios)},
                                              {"p10", percentile(pair_ratios, 10)},
                                              {"p90", percentile(pair_ratios, 90)},
                                              {"max", largest(pair_ratios)}};
  return {};
}

Result<void> measure_check(Bench& bench, Pair& pair) {
  bench.progress("check of all tensors, beside one OpenSSL stream and a reading of the same pages");
  // The last write to the target must be the daemon's, not the floor's.
  REFIT_TRY(pair.refits(1));
  const json command = {{"command", "check"},
                        {"times", bench.wants("check") ? bench.times(3, 1) : 1}};
  REFIT_TRY_ASSIGN(const Message message, pair.trainer.call(command));
  const auto check_s = message.body.at("check_s").get<Samples>();
  const auto stream_s = message.body.at("stream_s").get<Samples>();
  const double gigabytes = static_cast<double>(bench.model.bytes) / kBytesPerGB;
  const auto cores = static_cast<double>(allowed_cores().size());
  bench.figures["check_s"] = median(check_s);
  bench.figures["check_GBps"] = gigabytes / median(check_s);
  bench.figures["sha256_one_stream_GBps"] = gigabytes / median(stream_s);
  bench.figures["check_over_floor"] = median(ratios(stream_s, check_s)) / cores;
  const auto xxh3_s = message.body.at("xxh3_s").get<Samples>();
  const auto read_s = message.body.at("read_s").get<Samples>();
  bench.figures["check_xxh3_GBps"] = gigabytes / median(xxh3_s);
  bench.figures["read_GBps"] = gigabytes / median(read_s);
  bench.figures["check_xxh3_over_read"] = median(ratios(read_s, xxh3_s));
  bench.figures["digests_verified"] = message.body.at("verified");
  return {};
}

Result<void> measure_memory(Bench& bench, const Daemon& daemon) {
  REFIT_TRY_ASSIGN(const MemoryUse use, memory_use(daemon.pid(), kTensorLabel));
  bench.figures["daemon_memfd_MiB"] = use.session_mib;
  if (bench.fake_driver) {
    bench.skip("daemon_private_MiB", "the fake driver's own memory is in the same process");
  } else {
    bench.figures["daemon_private_MiB"] = use.private_mib;
    bench.figures["daemon_page_tables_MiB"] = use.page_tables_mib;
  }
  if (use.tensor_bytes == 0) {
    bench.skip("page_bytes", "no tensor of it is in host memory");
    return {};
  }
  bench.figures["page_bytes"] = use.tensor_page_bytes;
  bench.figures["tensor_huge_page_fraction"] = use.tensor_huge_fraction;
  return {};
}

/// False, with what was skipped for it, if source and target do not fit into memory.
bool fits(Bench& bench) {
  const std::uint64_t needed = needed_bytes(bench);
  const std::uint64_t available = memory_available_bytes();
  if (available >= needed) return true;
  const std::string reason = "source and target need " + in_gib(needed) + ", " + in_gib(available) +
                             " are available; a smaller --scale fits";
  const std::vector<std::pair<const char*, std::vector<const char*>>> keys_of_parts{
      {"attach",
       {"first_refit_over_memcpy", "populate_ms_per_GB", "populate_over_madvise",
        "populate_4k_over_madvise"}},
      {"refit",
       {"refit_s", "memcpy_s", "refit_over_memcpy", "daemon_private_MiB", "daemon_memfd_MiB",
        "page_bytes"}},
      {"check",
       {"check_s", "check_GBps", "check_over_floor", "sha256_one_stream_GBps", "check_xxh3_GBps",
        "read_GBps", "check_xxh3_over_read"}},
      {"counts",
       {"allocations_per_refit.full", "page_faults_per_refit.full", "syscalls_per_refit.full",
        "yields_per_refit.full", "opens_per_refit.full", "driver_calls_per_refit.full",
        "driver_copies_per_refit.full", "driver_opens_per_refit.full"}},
      {"reconnect", {"reconnect_ms.full"}},
      {"proof", {"proof.growth"}}};
  bench.progress("skipped the model at this size: " + reason);
  for (const auto& [part, keys] : keys_of_parts) {
    if (!bench.wants(part)) continue;
    for (const char* key : keys) bench.skip(key, reason);
  }
  return false;
}

}  // namespace

Result<void> measure_full(Bench& bench) {
  const bool attach = bench.wants("attach");
  const bool refit = bench.wants("refit");
  const bool check = bench.wants("check");
  const bool counts = bench.wants("counts");
  const bool reconnect = bench.wants("reconnect");
  const bool proof = bench.wants("proof");
  if (!attach && !refit && !check && !counts && !reconnect && !proof) return {};
  if (!fits(bench)) return {};

  bench.progress("trainer and engine allocate and fill " + in_gib(bench.model.bytes) + " each");
  REFIT_TRY_ASSIGN(Pair pair, Pair::start(bench, /*cut=*/false));
  double best_s = 0;
  if (attach || refit || proof) {
    REFIT_TRY_ASSIGN(best_s, calibrate(bench, pair));
  }
  if (attach || refit || check) {
    REFIT_TRY_ASSIGN(Daemon daemon,
                     Daemon::start({bench.options.refitd, "adaptive"}, bench.directory));
    if (attach) {
      REFIT_TRY(measure_attaches(bench, pair, daemon));
    } else {
      REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
    }
    if (refit) REFIT_TRY(measure_pairs(bench, pair, best_s));
    REFIT_TRY(measure_memory(bench, daemon));
    REFIT_TRY(measure_check(bench, pair));
    if (attach && !bench.on_devices()) REFIT_TRY(measure_plain_pages(bench, pair));
    REFIT_TRY(pair.detach());
    REFIT_TRY(daemon.stop());
  }
  if (counts) {
    bench.progress("counts per refit at full size");
    REFIT_TRY(count_per_refit(bench, pair, "full", bench.times(100, 5), bench.times(20, 5)));
  }
  if (reconnect) REFIT_TRY(measure_reconnect(bench, pair, "full"));
  if (proof) REFIT_TRY(measure_proof(bench, pair));
  return pair.end();
}

}  // namespace refit::bench
