// `refitctl metrics` against a live daemon: what it counts, and a file that the collector may read
// at any moment.
//
// One thread, and a daemon. The text is read by a parser that is as strict as Prometheus.
#include <sys/stat.h>

#include <cmath>
#include <fstream>
#include <sstream>

#include "support/exposition.hpp"
#include "support/refitctl_system.hpp"

namespace refit::test {
namespace {

class RefitctlMetrics : public RefitctlSystem {
 protected:
  Exposition scrape() {
    const Finished finished = refitctl({"metrics"});
    EXPECT_EQ(finished.status, 0) << finished.err;
    Exposition exposition(finished.out);
    for (const std::string& complaint : exposition.complaints()) ADD_FAILURE() << complaint;
    return exposition;
  }

  static std::string read(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }

  const std::string uid_ = std::to_string(::geteuid());
  const Exposition::Labels module_{{"uid", uid_}, {"engine", "engine0"}, {"module", "transformer"}};
};

TEST_F(RefitctlMetrics, RefitsChecksAndFailuresAreCounted) {
  // Goal: each kind of event moves its own counter. Method: one refit, one that names no engine, a
  // whole check, and a check that finds a difference, with a scrape before and after.
  daemon_->start();
  start_engine({"a", "b"});
  const Exposition before = scrape();
  ASSERT_TRUE(refit_once({"a", "b"}, '+'));
  RefitTarget nobody;
  nobody.engine = "nobody";
  nobody.module = "transformer";
  ASSERT_FALSE(trainer_->refit(nobody, soon()));
  const std::string manifest =
      file("saved.json", refitctl({"digest", "engine0/transformer", "--json"}).out);
  ASSERT_EQ(refitctl({"check", manifest}).status, 0);
  *bytes_of(1) ^= std::byte{1};
  ASSERT_EQ(refitctl({"check", manifest}).status, 1);

  const Exposition sut = scrape();

  EXPECT_EQ(before.value("refit_refits_committed_total"), 0);
  EXPECT_EQ(sut.value("refit_up"), 1);
  EXPECT_EQ(sut.value("refit_refits_committed_total"), 1);
  EXPECT_EQ(sut.value("refit_moved_bytes_total"), 2 * kTensorBytes);
  EXPECT_EQ(sut.value("refit_refits_failed_total", {{"reason", "no_such_engine"}}), 1);
  EXPECT_EQ(sut.value("refit_refits_failed_total", {{"reason", "deadline"}}), 0);
  for (const char* phase : {"wait", "gate", "copy", "total"}) {
    EXPECT_EQ(sut.value("refit_phase_seconds_count", {{"phase", phase}}), 1) << phase;
    EXPECT_EQ(sut.value("refit_phase_seconds_bucket", {{"phase", phase}, {"le", "+Inf"}}), 1);
  }
  EXPECT_GT(sut.value("refit_phase_seconds_sum", {{"phase", "total"}}), 0);
  EXPECT_EQ(sut.value("refit_checks_total"), 2);
  EXPECT_EQ(sut.value("refit_checked_tensors_total", {{"result", "verified"}}), 3);
  EXPECT_EQ(sut.value("refit_checked_tensors_total", {{"result", "mismatched"}}), 1);
  EXPECT_EQ(sut.value("refit_module_version", module_), 1);
  EXPECT_EQ(sut.value("refit_module_refits_total", module_), 1);
  Exposition::Labels committed = module_;
  committed["state"] = "committed";
  EXPECT_EQ(sut.value("refit_module_state", committed), 1);
  EXPECT_EQ(sut.value("refit_quota_used", {{"uid", uid_}, {"quota", "sessions"}}), 3);
  EXPECT_GT(sut.value("refit_quota_limit", {{"uid", uid_}, {"quota", "sessions"}}), 3);
  EXPECT_GT(sut.value("refit_uptime_seconds"), 0);
}

TEST_F(RefitctlMetrics, OnlyACheckOfTheWholeModuleProvesIt) {
  // Goal: the lag is that of the last version that was proven whole. Method: it is read before any
  // check, after one of a single tensor, after one of all, and after another refit, by a daemon
  // that proves nothing by itself.
  daemon_->start(REFITD_PATH, "", {"--proof-threads", "0"});
  start_engine({"a", "b"});
  ASSERT_TRUE(refit_once({"a", "b"}, '+'));
  const Exposition unproven = scrape();
  const std::string some =
      file("some.json", refitctl({"digest", "engine0/transformer", "--tensor", "a", "--json"}).out);
  const std::string all =
      file("all.json", refitctl({"digest", "engine0/transformer", "--json"}).out);
  ASSERT_EQ(refitctl({"check", some}).status, 0);
  const Exposition part = scrape();
  ASSERT_EQ(refitctl({"check", all}).status, 0);
  const Exposition proven = scrape();
  ASSERT_TRUE(refit_once({"a", "b"}, '-'));
  const Exposition behind = scrape();
  ASSERT_EQ(refitctl({"check", all}).status, 1);
  const Exposition refuted = scrape();

  for (const Exposition* sut : {&unproven, &part}) {
    EXPECT_EQ(sut->value("refit_module_proof_lag_versions", module_), 1);
    EXPECT_TRUE(std::isinf(sut->value("refit_module_proof_age_seconds", module_)));
  }
  EXPECT_EQ(proven.value("refit_module_proof_lag_versions", module_), 0);
  EXPECT_TRUE(std::isfinite(proven.value("refit_module_proof_age_seconds", module_)));
  EXPECT_EQ(behind.value("refit_module_proof_lag_versions", module_), 1);
  EXPECT_GT(behind.value("refit_module_proof_age_seconds", module_),
            proven.value("refit_module_proof_age_seconds", module_));
  EXPECT_EQ(refuted.value("refit_module_proof_lag_versions", module_), 1);
}

TEST_F(RefitctlMetrics, EngineThatWentLeavesNoSeries) {
  daemon_->start();
  start_engine({"a"});
  ASSERT_EQ(scrape().value("refit_module_version", module_), 0);

  engine_.reset();
  Exposition sut = scrape();
  for (const Deadline deadline = soon(); sut.has_family("refit_module_version");) {
    ASSERT_FALSE(deadline.passed());
    sut = scrape();
  }

  EXPECT_TRUE(std::isnan(sut.value("refit_module_version", module_)));
  EXPECT_FALSE(sut.has_family("refit_module_state"));
}

TEST_F(RefitctlMetrics, TextfileIsReplacedWhole) {
  daemon_->start();
  const std::string path = file("refit.prom", "stale\n");

  const Finished sut = refitctl({"metrics", "--textfile", path});

  EXPECT_EQ(sut.status, 0) << sut.err;
  EXPECT_EQ(sut.out, "");
  const Exposition text(read(path));
  EXPECT_TRUE(text.complaints().empty());
  EXPECT_EQ(text.value("refit_up"), 1);
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 07777U, 0644U);
}

TEST_F(RefitctlMetrics, TextfileSaysThatTheDaemonIsDown) {
  // Goal: the series of a daemon that is gone do not go on being told.
  const std::string path = file("refit.prom", "refit_refits_committed_total 7\n");

  const Finished sut = refitctl({"metrics", "--textfile", path});

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "no daemon at")) << sut.err;
  const Exposition text(read(path));
  EXPECT_TRUE(text.complaints().empty());
  EXPECT_EQ(text.value("refit_up"), 0);
  EXPECT_EQ(text.sample_count(), 1U);
}

TEST_F(RefitctlMetrics, TextfileThatCannotBeWrittenIsNamed) {
  daemon_->start();

  const Finished sut = refitctl({"metrics", "--textfile", folder_ + "/nowhere/refit.prom"});

  EXPECT_EQ(sut.status, 1);
  EXPECT_TRUE(contains(sut.err, "nowhere")) << sut.err;
}

TEST_F(RefitctlMetrics, JsonHasTheSameFamilies) {
  daemon_->start();

  const json root = parsed(refitctl({"metrics", "--json"}));

  EXPECT_EQ(root.at("metrics").at(0).at("name"), "refit_up");
  EXPECT_EQ(root.at("metrics").at(0).at("samples").at(0).at("value"), 1);
}

}  // namespace
}  // namespace refit::test
