// Refits on device memory are right whatever runs late: one scenario over many seeds of the fake
// driver and its three schedules. And each wait is needed: left out, the same scenario fails.
//
// Work on a stream runs at a moment and in an order that the seed decides, in the clients as in the
// daemon. Each seed has a daemon of its own, which says by its exit code whether it misused the
// driver or leaked; a client that did fails the program. scripts/fence-table prints how many seeds
// find each wait.
//
// On a real driver there is one schedule: work begins late by a function of the host before it.

#include <gtest/gtest.h>

#include <algorithm>
#include <csignal>
#include <cstdio>

#include "conformance/cuda_scenario.hpp"
#include "support/cuda/driver.hpp"
#include "support/daemon_process.hpp"
#include "support/effort.hpp"

namespace refit::test {
namespace {

class CudaSeeds : public ::testing::TestWithParam<const char*> {
 protected:
  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
};

TEST_P(CudaSeeds, GiveTheRightBytesAndDigests) {
  if (GetParam() != std::string("lazy")) REFIT_FAKE_ONLY("schedules");
  const std::uint64_t seeds = cuda::Driver::fake() ? rounds(200) : 5;
  for (std::uint64_t seed = 1; seed <= seeds && !HasFailure(); ++seed) {
    choose_schedule(seed, GetParam());
    DaemonOptions how;
    how.environment = {{"FAKECUDA_ROLE", "daemon"}};
    {
      DaemonProcess daemon(socket_, how);
      for (const MemoryKind kind : memory_kinds()) {
        const ScenarioOutcome outcome = run_scenario(socket_, kind, seed);
        EXPECT_TRUE(outcome.ok()) << name_of(kind) << ", seed " << seed << ", " << GetParam()
                                  << ": " << outcome.text();
        EXPECT_EQ(outcome.refits, 7);
      }
      daemon.send_signal(SIGTERM);
      EXPECT_EQ(daemon.wait_end(20'000), 0) << "seed " << seed;
    }
    end_of_test();
  }
}

INSTANTIATE_TEST_SUITE_P(Schedule, CudaSeeds, ::testing::Values("lazy", "eager", "mixed"),
                         [](const auto& test) { return std::string(test.param); });

// ---- each wait, left out

/// How many of the seeds from `first` on leave wrong bytes or digests under `schedule` where the
/// daemon leaves the wait `name` out; an empty name leaves none out.
unsigned wrong_seeds(const std::string& socket, const std::string& name,
                     const std::string& schedule, MemoryKind kind, std::uint64_t first,
                     unsigned seeds) {
  unsigned wrong = 0;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    choose_schedule(seed, schedule);
    DaemonOptions how;
    how.test_build = true;
    if (!name.empty()) how.point = name + "=skip";
    // What it does wrong beyond the bytes is not of interest here.
    how.environment = {{"FAKECUDA_ROLE", "daemon"}, {"FAKECUDA_ON_VIOLATION", "ignore"}};
    {
      DaemonProcess daemon(socket, how);
      const ScenarioOutcome outcome = run_scenario(socket, kind, seed);
      wrong += outcome.wrong_bytes > 0 || outcome.wrong_digests > 0 ? 1U : 0U;
    }
    end_of_test();
  }
  return wrong;
}

constexpr unsigned kRepetitions = 20;
constexpr unsigned kRealRepetitions = 3;

class CudaFences : public ::testing::TestWithParam<const char*> {
 protected:
  TemporaryDirectory directory_;
  std::string socket_ = directory_.path() + "/refitd.sock";
};

TEST_P(CudaFences, LeftOutShowsAsWrongBytesOrDigestsEveryTime) {
  // Nobody can hold back a device between a copy and its end.
  if (GetParam() == std::string("fence.done")) REFIT_FAKE_ONLY("a copy that ends late");
  const unsigned repetitions = cuda::Driver::fake() ? rounds(kRepetitions) : kRealRepetitions;
  for (const MemoryKind kind : memory_kinds()) {
    unsigned wrong = 0;
    for (unsigned i = 0; i < repetitions; ++i)
      wrong += wrong_seeds(socket_, GetParam(), "lazy", kind, 1, 1);
    EXPECT_EQ(wrong, *GetParam() == '\0' ? 0U : repetitions) << name_of(kind);
  }
}

std::string name_of_wait(const char* wait) {
  std::string name = *wait == '\0' ? "none" : wait;
  std::replace(name.begin(), name.end(), '.', '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(Wait, CudaFences,
                         ::testing::Values("", "fence.source", "fence.engine", "fence.done",
                                           "fence.digest_chunk"),
                         [](const auto& test) { return name_of_wait(test.param); });

/// Not a test: what scripts/fence-table prints.
TEST_P(CudaFences, DISABLED_Table) {
  std::printf("| %s |",
              *GetParam() == '\0' ? "none" : (std::string("`") + GetParam() + "`").c_str());
  for (const MemoryKind kind : memory_kinds()) {
    for (const char* schedule : {"lazy", "eager", "mixed"})
      std::printf(" %u |", wrong_seeds(socket_, GetParam(), schedule, kind, 1, kRepetitions));
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace
}  // namespace refit::test
