// How long a trainer is without a good refit when the daemon is killed under socket activation.
//
// Entered by the orchestrating thread, which plays systemd. Trainer and engine are told nothing:
// they come back by themselves.
#include "bench.hpp"
#include "stats.hpp"

namespace refit::bench {

Result<void> measure_reconnect(Bench& bench, Pair& pair, const std::string& size) {
  using Clock = std::chrono::steady_clock;
  const int rounds = bench.times(30, 3);
  bench.progress("killing an idle daemon " + std::to_string(rounds) + " times (" + size + ")");
  REFIT_TRY_ASSIGN(ActivatedDaemon daemon,
                   ActivatedDaemon::start(bench.options.refitd, bench.directory));
  REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
  REFIT_TRY(pair.refits(2));
  Samples seconds, plain;
  for (int i = 0; i < rounds; ++i) {
    REFIT_TRY(pair.trainer.call({{"command", "change"}}));
    const auto killed = Clock::now();
    daemon.kill();
    REFIT_TRY(pair.trainer.tell({{"command", "refit_changed"}}));
    REFIT_TRY(daemon.activate());
    REFIT_TRY_ASSIGN(const Message done, pair.trainer.hear());
    const auto ended =
        Clock::time_point(std::chrono::nanoseconds(done.body.at("ended_ns").get<std::int64_t>()));
    seconds.push_back(std::chrono::duration<double>(ended - killed).count());
    // A refit without a death, to tell its share.
    REFIT_TRY_ASSIGN(const Samples undisturbed, pair.refits(1));
    plain.push_back(undisturbed.front());
  }
  constexpr double kMillisecondsPerSecond = 1e3;
  bench.figures["reconnect_ms"][size] = {
      {"p50", percentile(seconds, 50) * kMillisecondsPerSecond},
      {"p99", percentile(seconds, 99) * kMillisecondsPerSecond},
      {"max", largest(seconds) * kMillisecondsPerSecond},
      {"plain_refit_p50", percentile(plain, 50) * kMillisecondsPerSecond},
      {"rounds", rounds}};
  return pair.detach();
}

}  // namespace refit::bench
