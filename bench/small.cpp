// Figures with tensors of 64 bytes, where nothing but the protocol costs: fixed overhead and
// registration; and the ring.
//
// Entered by the orchestrating thread. Must not touch the model at its full size.
#include <array>

#include "bench.hpp"
#include "counters.hpp"
#include "floor.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

constexpr double kMicrosecondsPerSecond = 1e6;

ordered_json p50_p99(const Samples& seconds, double unit_per_second) {
  return {{"p50", percentile(seconds, 50) * unit_per_second},
          {"p99", percentile(seconds, 99) * unit_per_second}};
}

struct Attached {
  std::string waiting;
  Daemon daemon;
  Pair pair;
  Samples seconds;
  Samples block_medians;

  static Result<Attached> start(const Bench& bench, const std::string& waiting) {
    REFIT_TRY_ASSIGN(Daemon daemon,
                     Daemon::start({bench.options.refitd, waiting}, bench.directory));
    REFIT_TRY_ASSIGN(Pair pair, Pair::start(bench, /*cut=*/true));
    REFIT_TRY(pair.attach(daemon.socket(), waiting));
    REFIT_TRY(pair.refits(bench.times(200, 2)));
    return Attached{waiting, std::move(daemon), std::move(pair), {}, {}};
  }

  Result<void> run_block(int refits) {
    REFIT_TRY_ASSIGN(const Samples block, pair.refits(refits));
    seconds.insert(seconds.end(), block.begin(), block.end());
    block_medians.push_back(median(block));
    return {};
  }
};

/// Blocks of refits in both waiting modes in turn, the first of each round alternating, so that the
/// machine's moods meet both alike.
Result<void> measure_overhead(Bench& bench, Attached& off, Attached& adaptive) {
  const int blocks = bench.times(40, 2);
  const int refits_per_block = bench.times(100, 5);
  for (int block = 0; block < blocks; ++block) {
    for (Attached* side :
         block % 2 == 0 ? std::array{&off, &adaptive} : std::array{&adaptive, &off}) {
      REFIT_TRY(side->run_block(refits_per_block));
    }
  }
  bench.figures["fixed_overhead_us"] = {
      {"off", p50_p99(off.seconds, kMicrosecondsPerSecond)},
      {"adaptive", p50_p99(adaptive.seconds, kMicrosecondsPerSecond)}};
  bench.figures["adaptive_over_off"] = {
      {"p50", median(adaptive.seconds) / median(off.seconds)},
      {"blocks_p50", median(ratios(adaptive.block_medians, off.block_medians))}};

  bench.progress("fixed overhead with an engine that is busy in steps of 200 us");
  constexpr int kStepMicroseconds = 200;
  REFIT_TRY(adaptive.pair.open_gate(kStepMicroseconds));
  REFIT_TRY(adaptive.pair.refits(bench.times(50, 2)));
  REFIT_TRY_ASSIGN(const Samples busy, adaptive.pair.refits(bench.times(2000, 5)));
  bench.figures["fixed_overhead_busy_us"] = p50_p99(busy, kMicrosecondsPerSecond);
  return {};
}

Result<void> measure_register(Bench& bench, Pair& pair) {
  bench.progress("registration of " + std::to_string(bench.model.target.size()) +
                 " tensors of 64 bytes");
  REFIT_TRY(pair.close_gate());
  const json command = {{"command", "register_often"}, {"times", bench.times(20, 2)}};
  REFIT_TRY_ASSIGN(const Message engine, pair.engine.call(command));
  REFIT_TRY_ASSIGN(const Message trainer, pair.trainer.call(command));
  const double engine_s = median(engine.body.at("seconds").get<Samples>());
  const double trainer_s = median(trainer.body.at("seconds").get<Samples>());
  bench.figures["register_ms"] = engine_s * 1e3;
  bench.figures["register_source_ms"] = trainer_s * 1e3;
  return {};
}

Result<void> ping_in_mode(Bench& bench, const std::string& waiting) {
  const std::vector<int> cores = allowed_cores();
  REFIT_TRY_ASSIGN(Daemon daemon, Daemon::start({bench.options.refitd, waiting}, bench.directory));
  REFIT_TRY_ASSIGN(Peer trainer, Peer::start("trainer"));
  REFIT_TRY(
      trainer.call({{"command", "connect"}, {"socket", daemon.socket()}, {"waiting", waiting}}));
  REFIT_TRY(pin_all_threads(daemon.pid(), cores[0]));
  REFIT_TRY_ASSIGN(const Message message, trainer.call({{"command", "ping"},
                                                        {"count", bench.times(20'000, 200)},
                                                        {"core", cores[1 % cores.size()]}}));
  constexpr double kNanosecondsPerSecond = 1e9;
  bench.figures["ring_rtt_ns"][waiting] =
      p50_p99(message.body.at("seconds").get<Samples>(), kNanosecondsPerSecond);
  REFIT_TRY(trainer.call({{"command", "disconnect"}}));
  REFIT_TRY(trainer.end());
  return daemon.stop();
}

}  // namespace

Result<void> measure_small(Bench& bench) {
  const bool overhead = bench.wants("overhead");
  // Populating is registration less its metadata, which is measured here.
  const bool registration = bench.wants("register") || bench.wants("attach");
  if (overhead || registration) {
    bench.progress("fixed overhead: " + std::to_string(bench.model.target.size()) +
                   " tensors of 64 bytes, waiting off and adaptive in turn");
    REFIT_TRY_ASSIGN(Attached adaptive, Attached::start(bench, "adaptive"));
    if (overhead) {
      REFIT_TRY_ASSIGN(Attached off, Attached::start(bench, "off"));
      REFIT_TRY(measure_overhead(bench, off, adaptive));
      REFIT_TRY(off.pair.detach());
      REFIT_TRY(off.daemon.stop());
      REFIT_TRY(off.pair.end());
    }
    if (registration) REFIT_TRY(measure_register(bench, adaptive.pair));
    REFIT_TRY(adaptive.pair.detach());
    REFIT_TRY(adaptive.daemon.stop());
    REFIT_TRY(adaptive.pair.end());
  }
  if (bench.wants("counts")) {
    bench.progress("counts per refit with tensors of 64 bytes");
    REFIT_TRY_ASSIGN(Pair pair, Pair::start(bench, /*cut=*/true));
    REFIT_TRY(count_per_refit(bench, pair, "small", bench.times(100, 5), bench.times(2000, 5)));
    REFIT_TRY(pair.end());
  }
  if (bench.wants("reconnect")) {
    REFIT_TRY_ASSIGN(Pair pair, Pair::start(bench, /*cut=*/true));
    REFIT_TRY(measure_reconnect(bench, pair, "small"));
    REFIT_TRY(pair.end());
  }
  return {};
}

Result<void> measure_ring(Bench& bench) {
  if (!bench.wants("ring")) return {};
  if (allowed_cores().size() < 2) {
    bench.skip("ring_rtt_ns", "trainer and daemon need a core each, and there is one");
    return {};
  }
  for (const char* waiting : {"off", "adaptive", "always"}) {
    bench.progress(std::string("ring round trips, waiting ") + waiting);
    auto measured = ping_in_mode(bench, waiting);
    if (measured) continue;
    if (measured.error().code != Errc::not_enough_cores) return measured;
    bench.figures["ring_rtt_ns"][waiting] = nullptr;
    bench.skip(std::string("ring_rtt_ns.") + waiting, measured.error().message);
  }
  return {};
}

}  // namespace refit::bench
