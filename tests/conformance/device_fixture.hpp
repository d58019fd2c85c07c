// DeviceFixture: the conformance fixture with a look at what the daemon asks of the driver, which
// the fake one counts in a page that it shares; a real one tells nobody.
#pragma once

#include <cstdlib>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "conformance/refit_fixture.hpp"
#include "support/cuda/driver.hpp"

namespace refit::test {

class DeviceFixture : public Refit {
 protected:
  /// Without proofs, whose calls come when they like.
  explicit DeviceFixture(DaemonOptions how = {}) : Refit(without_proof(std::move(how))) {}
  static DaemonOptions without_proof(DaemonOptions how) {
    how.arguments.insert(how.arguments.end(), {"--proof-threads", "0"});
    return how;
  }

  fakecuda::ProcessReport daemon_report() {
    auto report = fakecuda::ProcessReport::open(std::getenv("FAKECUDA_DIR"), daemon_.pid());
    EXPECT_TRUE(report);
    return std::move(*report);
  }
  using Calls = std::map<std::string, std::uint64_t>;
  static Calls calls_of(const fakecuda::ProcessReport& report) {
    Calls all;
    for (const auto& entry : report->calls) {
      if (entry.name[0] == '\0') break;
      all[entry.name] += entry.count.load();
    }
    return all;
  }
  /// Calls since `before`, those of no number left out.
  static Calls since(const Calls& before, const Calls& now) {
    Calls made;
    for (const auto& [name, count] : now) {
      const auto old = before.find(name);
      const std::uint64_t first = old == before.end() ? 0 : old->second;
      if (count != first) made[name] = count - first;
    }
    return made;
  }
  static std::vector<std::uint64_t> gauges_of(const fakecuda::ProcessReport& report) {
    std::vector<std::uint64_t> all;
    for (const auto& gauge : report->gauges) all.push_back(gauge.load());
    return all;
  }
  static constexpr std::uint64_t kSteadyRefits = 10;
  /// What the daemon asks of the driver in kSteadyRefits refits of `all`, each of other bytes,
  /// after the one that made the plans. Expects that it holds as much after them as before, and
  /// that it asks for nothing but copies, their fences and `more`.
  Calls calls_of_steady_refits(Trainer& trainer, test::Model& source,
                               const std::vector<RefitTarget>& all, const std::string& more = {}) {
    source.fill(1);
    must(trainer.refit_all(all, soon()));
    const auto report = daemon_report();
    const auto before = calls_of(report);
    const auto held = gauges_of(report);
    for (std::uint64_t step = 2; step < 2 + kSteadyRefits; ++step) {
      source.fill(step);
      must(trainer.refit_all(all, soon()));
    }
    const Calls made = since(before, calls_of(report));
    EXPECT_EQ(gauges_of(report), held);
    const std::set<std::string> allowed{
        "cuCtxPushCurrent", "cuCtxPopCurrent",    "cuStreamWaitEvent", "cuMemcpyBatchAsync",
        "cuEventRecord",    "cuEventSynchronize", "cuEventQuery",      more};
    for (const auto& [name, times] : made)
      EXPECT_TRUE(allowed.contains(name)) << name << ", " << times << " times";
    return made;
  }
  /// What the daemon holds of the driver's; nothing where only the driver knows.
  std::vector<std::uint64_t> held_by_daemon() {
    if (!cuda::Driver::fake()) return {};
    return gauges_of(daemon_report());
  }
};

}  // namespace refit::test
