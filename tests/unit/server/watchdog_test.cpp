// When a worker counts as hanging: readings in order, without threads and without a clock.

#include "server/watchdog.hpp"

#include <gtest/gtest.h>

namespace refit::daemon {
namespace {

using namespace std::chrono_literals;

class WorkerHealthTest : public ::testing::Test {
 protected:
  int look(std::chrono::seconds at, std::vector<WorkerReading> readings) {
    return sut_.look(readings, WorkerHealth::Clock::time_point(at));
  }
  WorkerHealth sut_{10s};
};

TEST_F(WorkerHealthTest, IdleWorkersNeverHang) {
  for (int second = 0; second < 100; ++second) EXPECT_EQ(look(1s * second, {{0, 5}, {2, 5}}), -1);
}

// A copy of 100 GB is one job.
TEST_F(WorkerHealthTest, LongJobThatUsesTheCpuIsNoHang) {
  for (int second = 0; second < 100; ++second) EXPECT_EQ(look(1s * second, {{1, 5 + second}}), -1);
}

TEST_F(WorkerHealthTest, ManyShortJobsAreNoHang) {
  std::uint64_t turns = 1;
  for (int second = 0; second < 100; ++second, turns += 2)
    EXPECT_EQ(look(1s * second, {{turns, 5}}), -1);
}

TEST_F(WorkerHealthTest, JobWithoutProgressHangsAfterTheBoundAndNoEarlier) {
  EXPECT_EQ(look(0s, {{0, 5}, {3, 5}}), -1);
  EXPECT_EQ(look(9s, {{0, 5}, {3, 5}}), -1);
  EXPECT_EQ(look(10s, {{0, 5}, {3, 5}}), 1);
  EXPECT_EQ(look(15s, {{0, 5}, {3, 5}}), 1);
  EXPECT_EQ(look(16s, {{0, 5}, {4, 5}}), -1) << "it went on";
}

// The job that begins now gets the whole bound, however long the thread slept before.
TEST_F(WorkerHealthTest, SleepBeforeAJobDoesNotCount) {
  EXPECT_EQ(look(0s, {{2, 5}}), -1);
  EXPECT_EQ(look(50s, {{3, 5}}), -1);
  EXPECT_EQ(look(59s, {{3, 5}}), -1);
  EXPECT_EQ(look(60s, {{3, 5}}), 0);
}

}  // namespace
}  // namespace refit::daemon
