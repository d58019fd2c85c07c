// What the proof in the background costs a refit that begins beside it.
//
// Entered by the orchestrating thread. A daemon that proves and one that does not take turns, and
// each refit is set against a plain copy just before it that no proof disturbed, because the speed
// of memory drifts by more than the proof costs.
#include <chrono>
#include <refit/observer.hpp>
#include <thread>

#include "bench.hpp"
#include "roles.hpp"
#include "stats.hpp"

namespace refit::bench {
namespace {

/// Of daemons that prove, or do not.
struct Daemons {
  bool prove;
  Samples refit_s = {};
  Samples over_copy = {};
  std::uint64_t beside_a_proof = 0;  ///< how many proofs a refit found under way
};

Result<void> await_proof(Observer& observer) {
  const Deadline deadline = Deadline::in(kCallTimeout);
  for (;;) {
    REFIT_TRY_ASSIGN(const DaemonStatus status, observer.status(deadline));
    const ModuleStatus& module = status.modules.at(0);
    if (module.proven_version == module.version) return {};
    if (deadline.passed()) {
      return fail(Errc::deadline, "version " + std::to_string(module.version) + " of " +
                                      module.engine + '/' + module.module + " was not proven in " +
                                      std::to_string(kCallTimeout.count()) + " s");
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

/// By a daemon of their own, so that no choice that a daemon makes for its life weighs on one side.
Result<void> measure_batch(const Bench& bench, Pair& pair, Daemons& side, int count) {
  const char* const threads = side.prove ? "1" : "0";
  REFIT_TRY_ASSIGN(
      Daemon daemon,
      Daemon::start({bench.options.refitd, "adaptive", {}, {"--proof-threads", threads}},
                    bench.directory));
  ConnectOptions options;
  options.socket_path = daemon.socket();
  REFIT_TRY_ASSIGN(auto observer, Observer::connect("bench", options, Deadline::in(kCallTimeout)));
  REFIT_TRY(pair.attach(daemon.socket(), "adaptive"));
  REFIT_TRY(pair.refits(2));
  for (int i = 0; i < count; ++i) {
    if (side.prove) REFIT_TRY(await_proof(observer));
    REFIT_TRY_ASSIGN(const Message copy, pair.trainer.call({{"command", "copy"}}));
    // The second begins while the first is being proven.
    REFIT_TRY_ASSIGN(const Samples refits, pair.refits(2));
    side.refit_s.push_back(refits.back());
    side.over_copy.push_back(refits.back() / copy.body.at("seconds").get<double>());
  }
  REFIT_TRY_ASSIGN(const DaemonMetrics metrics, observer.metrics(Deadline::in(kCallTimeout)));
  side.beside_a_proof += metrics.proofs.overtaken;
  REFIT_TRY(pair.detach());
  return daemon.stop();
}

}  // namespace

Result<void> measure_proof(Bench& bench, Pair& pair) {
  Daemons on{true};
  Daemons off{false};
  const int batches = bench.times(8, 1);
  for (int batch = 0; batch < batches; ++batch) {
    bench.progress("refits beside a proof and without one, batch " + std::to_string(batch + 1) +
                   " of " + std::to_string(batches));
    for (Daemons* side : {&on, &off})
      REFIT_TRY(measure_batch(bench, pair, *side, bench.times(5, 1)));
  }
  bench.figures["proof"] = {{"refit_s_on", median(on.refit_s)},
                            {"refit_s_off", median(off.refit_s)},
                            {"over_memcpy_on", median(on.over_copy)},
                            {"over_memcpy_off", median(off.over_copy)},
                            {"growth", median(on.over_copy) / median(off.over_copy) - 1},
                            {"refits", on.refit_s.size()},
                            {"refits_beside_a_proof", on.beside_a_proof}};
  return {};
}

}  // namespace refit::bench
