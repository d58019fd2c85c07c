// The daemon's counters as Prometheus text and as JSON. One thread.
#include "refitctl/format/metrics.hpp"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "support/exposition.hpp"

namespace refit::ctl {
namespace {

using test::Exposition;

DaemonMetrics sample() {
  DaemonMetrics metrics;
  metrics.version = "0.1.0";
  metrics.copy_kernel = "nt_avx512";
  metrics.protocol = 1;
  metrics.layout = 0xabcdef;
  metrics.uptime_us = 2'500'000;
  metrics.committed = 6;
  metrics.moved_bytes = 4096;
  metrics.failures = {{Errc::engine_not_ready, 2}, {static_cast<Errc>(999), 1}};
  metrics.bounds_us = {10, 25, 1'000'000};
  for (PhaseHistogram* phase : {&metrics.wait, &metrics.gate, &metrics.copy, &metrics.total})
    *phase = {{1, 2, 0, 3}, 5'000'000};
  metrics.checks = 1;
  metrics.tensors_verified = 2;
  metrics.quotas = {{1000, "sessions", 3, 64}, {1000, "registered_bytes", 8192, 0}};
  ModuleMetrics module{"flux", "transformer",
                       1000,   ModuleState::committed,
                       12,     12,
                       4096,   ModuleProof{10, 1'500'000}};
  metrics.modules = {module};
  module.module = "vae";
  module.proof.reset();
  metrics.modules.push_back(module);
  return metrics;
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

TEST(Metrics, TextIsWhatPrometheusReads) {
  const Exposition sut(prometheus_text(metric_families(sample())));

  EXPECT_EQ(joined(sut.complaints()), "");
  EXPECT_EQ(sut.value("refit_up"), 1);
  EXPECT_EQ(sut.value("refit_uptime_seconds"), 2.5);
  EXPECT_EQ(sut.value("refit_refits_committed_total"), 6);
  EXPECT_EQ(sut.value("refit_moved_bytes_total"), 4096);
  EXPECT_EQ(sut.value("refit_refits_failed_total", {{"reason", "engine_not_ready"}}), 2);
  EXPECT_EQ(sut.value("refit_refits_failed_total", {{"reason", "code_999"}}), 1);
  EXPECT_EQ(sut.value("refit_refits_failed_total", {{"reason", "quota"}}), 0);
  EXPECT_EQ(sut.value("refit_build_info", {{"version", "0.1.0"},
                                           {"protocol", "1"},
                                           {"layout", "0000000000abcdef"},
                                           {"copy_kernel", "nt_avx512"},
                                           {"waiting", "adaptive"}}),
            1);
}

TEST(Metrics, PhasesAreCumulativeHistogramsInSeconds) {
  const Exposition sut(prometheus_text(metric_families(sample())));

  EXPECT_EQ(sut.value("refit_phase_seconds_bucket", {{"phase", "gate"}, {"le", "1e-05"}}), 1);
  EXPECT_EQ(sut.value("refit_phase_seconds_bucket", {{"phase", "gate"}, {"le", "2.5e-05"}}), 3);
  EXPECT_EQ(sut.value("refit_phase_seconds_bucket", {{"phase", "gate"}, {"le", "1"}}), 3);
  EXPECT_EQ(sut.value("refit_phase_seconds_bucket", {{"phase", "gate"}, {"le", "+Inf"}}), 6);
  EXPECT_EQ(sut.value("refit_phase_seconds_count", {{"phase", "total"}}), 6);
  EXPECT_EQ(sut.value("refit_phase_seconds_sum", {{"phase", "total"}}), 5);
}

TEST(Metrics, ModulesSayHowFarTheProofLags) {
  const Exposition sut(prometheus_text(metric_families(sample())));
  const Exposition::Labels proven{{"uid", "1000"}, {"engine", "flux"}, {"module", "transformer"}};
  const Exposition::Labels unproven{{"uid", "1000"}, {"engine", "flux"}, {"module", "vae"}};

  EXPECT_EQ(sut.value("refit_module_proof_lag_versions", proven), 2);
  EXPECT_EQ(sut.value("refit_module_proof_age_seconds", proven), 1.5);
  EXPECT_EQ(sut.value("refit_module_proof_lag_versions", unproven), 12);
  EXPECT_TRUE(std::isinf(sut.value("refit_module_proof_age_seconds", unproven)));
  Exposition::Labels state = proven;
  state["state"] = "committed";
  EXPECT_EQ(sut.value("refit_module_state", state), 1);
  state["state"] = "poisoned";
  EXPECT_EQ(sut.value("refit_module_state", state), 0);
}

TEST(Metrics, LimitsThatDoNotExistHaveNoSample) {
  const Exposition sut(prometheus_text(metric_families(sample())));

  EXPECT_EQ(sut.value("refit_quota_limit", {{"uid", "1000"}, {"quota", "sessions"}}), 64);
  EXPECT_EQ(sut.value("refit_quota_used", {{"uid", "1000"}, {"quota", "registered_bytes"}}), 8192);
  EXPECT_TRUE(
      std::isnan(sut.value("refit_quota_limit", {{"uid", "1000"}, {"quota", "registered_bytes"}})));
}

TEST(Metrics, NamesThatOthersChoseAreEscaped) {
  DaemonMetrics metrics = sample();
  const std::string evil = "a\"} 1\nrefit_up{x=\"\\";
  metrics.modules[0].engine = evil;
  metrics.modules[1].engine = "not utf-8: \xff";

  const Exposition sut(prometheus_text(metric_families(metrics)));

  EXPECT_EQ(joined(sut.complaints()), "");
  EXPECT_EQ(sut.value("refit_module_version",
                      {{"uid", "1000"}, {"engine", evil}, {"module", "transformer"}}),
            12);
  EXPECT_EQ(sut.value("refit_module_version",
                      {{"uid", "1000"}, {"engine", "not utf-8: \\xff"}, {"module", "vae"}}),
            12);
}

TEST(Metrics, DaemonThatDoesNotAnswerIsDown) {
  const Exposition sut(prometheus_text(metric_families_of_no_daemon()));

  EXPECT_EQ(joined(sut.complaints()), "");
  EXPECT_EQ(sut.value("refit_up"), 0);
  EXPECT_EQ(sut.sample_count(), 1U);
}

TEST(Metrics, JsonHasTheSameSamples) {
  const auto families = metric_families(sample());
  const auto root = nlohmann::json::parse(metrics_json(families));
  const Exposition text(prometheus_text(families));

  std::size_t samples = 0;
  for (const auto& family : root.at("metrics")) {
    for (const auto& sample : family.at("samples")) {
      ++samples;
      const double value = text.value(sample.at("name"), sample.at("labels"));
      if (sample.at("value").is_null()) {
        EXPECT_TRUE(std::isinf(value)) << sample;
      } else {
        EXPECT_EQ(sample.at("value").get<double>(), value) << sample;
      }
    }
  }
  EXPECT_EQ(samples, text.sample_count());
}

// The parser is what the tests stand on: it must find what is wrong.
TEST(Exposition, FindsWhatPrometheusWouldRefuse) {
  const std::string head = "# HELP a_total A.\n# TYPE a_total counter\n";
  EXPECT_TRUE(Exposition(head + "a_total 1\n").complaints().empty());
  for (const std::string& wrong :
       {head + "a_total 1", head + "a_total\n", head + "a_total x\n", head + "b 1\n",
        head + "a_total 1\na_total 1\n", head + "a_total -1\n", head + "a_total{x=1} 1\n",
        head + "a_total{x=\"\\t\"} 1\n", head + "a_total{x=\"1} 1\n", head + head,
        std::string("a_total 1\n"), std::string("# TYPE a_total counter\na_total 1\n"),
        std::string("# HELP a A.\n# TYPE a counter\na 1\n"),
        std::string("# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\nh_sum 1\nh_count 2\n"),
        std::string("# HELP h H.\n# TYPE h histogram\nh_bucket{le=\"1\"} 2\n"
                    "h_bucket{le=\"+Inf\"} 1\nh_sum 1\nh_count 1\n")}) {
    EXPECT_FALSE(Exposition(wrong).complaints().empty()) << wrong;
  }
}

}  // namespace
}  // namespace refit::ctl
