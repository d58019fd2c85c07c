// The device copier: right bytes by as few calls as there are pairs, every wait needed, every
// failing call an answer.
//
// Method: each test runs one scenario of device_copier_scenarios.cpp as a process on the fake
// driver, with a driver version, faults or a wait left out. The fake ends a process that leaks or
// misuses it with an exit code of its own, so that an exit with 0 is worth something.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "memory/cuda/kernels/image.hpp"
#include "support/effort.hpp"
#include "unit/cuda/device_copier_scenarios.hpp"

namespace refit::cuda::test {
namespace {

using Environment = std::map<std::string, std::string>;

struct End {
  int code = -1;  ///< exit code, or -signal
  std::string output;

  [[nodiscard]] bool says(const std::string& text) const {
    return output.find(text) != std::string::npos;
  }
};

/// Runs a scenario; kills it after a bound, so that a hang is a failure and not a hang.
End run(const std::string& scenario, Environment environment = {}) {
  char directory[] = "/dev/shm/refit-fakecuda-XXXXXX";
  if (::mkdtemp(directory) == nullptr) return {};
  environment["FAKECUDA_DIR"] = directory;
  environment["LD_LIBRARY_PATH"] = FAKE_CUDA_FOLDER;
  environment["FAKECUDA_KERNELS"] = FAKE_CUDA_KERNELS;
  std::vector<std::string> words;
  for (const auto& [name, value] : environment) words.push_back(name + "=" + value);
  std::vector<char*> envp;
  for (std::string& word : words) envp.push_back(word.data());
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string name(*entry, std::strcspn(*entry, "="));
    if (!environment.contains(name)) envp.push_back(*entry);
  }
  envp.push_back(nullptr);
  std::string name = scenario;
  std::string program = "device_copier_scenario";
  char* argv[] = {program.data(), name.data(), nullptr};
  int output[2] = {-1, -1};
  if (::pipe2(output, O_CLOEXEC) != 0) return {};
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    ::dup2(output[1], 1);
    ::dup2(output[1], 2);
    ::execve("/proc/self/exe", argv, envp.data());
    ::_exit(127);
  }
  ::close(output[1]);
  End end;
  for (;;) {
    constexpr int kBoundMs = 60'000;
    pollfd entry{output[0], POLLIN, 0};
    char buffer[4096];
    if (::poll(&entry, 1, kBoundMs) == 0) ::kill(pid, SIGKILL);
    const ssize_t bytes = ::read(output[0], buffer, sizeof buffer);
    if (bytes <= 0) break;
    end.output.append(buffer, static_cast<std::size_t>(bytes));
  }
  ::close(output[0]);
  int status = 0;
  ::waitpid(pid, &status, 0);
  end.code = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
  std::filesystem::remove_all(directory);
  return end;
}

void expect_good(const std::string& scenario, const Environment& environment = {}) {
  const End end = run(scenario, environment);
  EXPECT_EQ(end.code, 0) << scenario << ":\n" << end.output;
}

// ---- bytes and calls

TEST(DeviceCopier, MovesAllPairsOfPlacesInOneBatchCallEach) { expect_good("pairs"); }
TEST(DeviceCopier, MovesAllPairsByTheFirstAbiOfTheBatchCall) {
  expect_good("pairs", {{"FAKECUDA_DRIVER_VERSION", "12080"}});
}
TEST(DeviceCopier, MovesAllPairsOneByOneWhereTheDriverHasNoBatchCall) {
  expect_good("pairs", {{"FAKECUDA_DRIVER_VERSION", "12000"}});
}
TEST(DeviceCopier, CopiesOneByOneBetweenDevicesThatCannotReachEachOther) {
  expect_good("pairs", {{"FAKECUDA_DEVICE_1", "peers=0"}});
}
TEST(DeviceCopier, IsRightWhateverTheOrderOfTheWork) {
  for (const char* schedule : {"lazy", "eager", "mixed"}) {
    for (unsigned seed = 1; seed <= refit::test::rounds(3); ++seed)
      expect_good("pairs",
                  {{"FAKECUDA_SCHEDULE", schedule}, {"FAKECUDA_SEED", std::to_string(seed)}});
  }
}
TEST(DeviceCopier, ExpandsStridesIntoRuns) { expect_good("strides"); }
TEST(DeviceCopier, WritesPartsWhereTheyBeginThisTimeOrLeavesThemOut) { expect_good("parts"); }
TEST(DeviceCopier, CastsByOneLaunchForEachCastAndDevice) { expect_good("launches"); }
TEST(DeviceCopier, CastsWhateverTheOrderOfTheWork) {
  for (const char* schedule : {"eager", "mixed", "lazy,eager"})
    expect_good("launches", {{"FAKECUDA_SCHEDULE", schedule}});
}
TEST(DeviceCopier, LoadsKernelsThatDoNotLoadOnceOnEachDevice) { expect_good("kernels_once"); }
TEST(DeviceCopier, RefusesWhatItCannotCopyByName) { expect_good("refusals"); }
#ifndef REFIT_SANITIZED
TEST(DeviceCopier, AllocatesNothingOnceAJobIsPrepared) { expect_good("allocations"); }
#endif
TEST(DeviceCopier, QueuesAllJobsOfASubmitBeforeItWaitsForOne) { expect_good("several"); }
TEST(DeviceCopier, LetsGoOfAJobBeforeItIsDone) { expect_good("from_done"); }
TEST(DeviceCopier, FinishesWhatWasSubmittedBeforeItGoes) { expect_good("end"); }
TEST(DeviceCopier, IsNoHangingWorkerWhileADeviceWaitsForAStoppedTrainer) { expect_good("waiting"); }
TEST(DeviceReader, ReadsEveryLengthThroughAnySmallBuffer) { expect_good("reader"); }
TEST(DeviceReader, CopiesTheNextChunkWhileOneIsHandedOut) { expect_good("reader_ahead"); }

// ---- waits

TEST(Fences, InPlaceTheyAreEnoughForEverySeedAndSchedule) {
  const End end = run("fences");
  EXPECT_EQ(end.code, 0) << end.output;
  EXPECT_TRUE(end.says("wrong 0 of " + std::to_string(5 * refit::test::rounds(20)))) << end.output;
}
TEST(Fences, EachOneLeftOutShowsAsWrongBytes) {
  for (const char* name :
       {"source", "engine", "done", "digest_chunk", "digest_swap", "digest_stop"}) {
    const End end = run("fences", {{"REFIT_POINT", std::string("fence.") + name + "=skip"}});
    EXPECT_EQ(end.code, 0) << end.output;
    EXPECT_TRUE(end.says("wrong ")) << end.output;
    EXPECT_FALSE(end.says("wrong 0 of")) << "nothing needs fence." << name;
  }
}

// ---- failures

/// All that the driver may answer to the k-th call of a function, in each way, from the moment
/// that a job is prepared or submitted on.
class Failures : public ::testing::Test {
 public:
  static constexpr const char* kPlain = "2";     // out of memory
  static constexpr const char* kSticky = "719";  // launch failed

  static End fail(const std::string& phase, const std::string& function, int k, const char* code,
                  const char* kind, Environment environment = {}) {
    environment["FAULT_PHASE"] = phase;
    environment["FAULT"] = function + "#" + std::to_string(k) + "=" + code + ":" + kind;
    End end = run("failure", environment);
    EXPECT_EQ(end.code, 0) << environment["FAULT"] << " while it was " << phase << ":\n"
                           << end.output;
    return end;
  }
};

TEST_F(Failures, InPreparingNameTheCallAndLeaveTheJobEmptyAndTheCopierUsable) {
  struct Case {
    const char* function;
    int calls;
  };
  for (const auto& [function, calls] :
       {Case{"cuCtxPushCurrent", 3}, Case{"cuStreamCreate", 3}, Case{"cuEventCreate", 3},
        Case{"cuCtxEnablePeerAccess", 1}}) {
    for (const char* kind : {"refuse", "after"}) {
      for (int k = 1; k <= calls; ++k) {
        const End end = fail("prepared", function, k, kPlain, kind);
        EXPECT_TRUE(end.says("not prepared: ")) << end.output;
        EXPECT_TRUE(end.says(function) && end.says("(2)")) << end.output;
        EXPECT_TRUE(end.says("again: ok")) << end.output;
      }
    }
  }
}

// Goal: a cast that cannot be prepared is refused by the call and what it was for, and the kernels
// that were loaded are unloaded.
TEST_F(Failures, OfKernelsNameTheCallAndLeaveTheCopierUsable) {
  if (kernel_image().empty()) GTEST_SKIP() << "this build has no kernels";
  for (const char* function :
       {"cuModuleLoadData", "cuModuleGetFunction", "cuMemAlloc", "cuMemcpyAsync"}) {
    for (const char* kind : {"refuse", "after"}) {
      const End end = fail("prepared", function, 1, kPlain, kind);
      EXPECT_TRUE(end.says("not prepared: ")) << end.output;
      EXPECT_TRUE(end.says("casting device 1 to device 1") && end.says(function) && end.says("(2)"))
          << end.output;
      EXPECT_TRUE(end.says("again: ok")) << end.output;
    }
  }
  for (const char* kind : {"refuse", "after"}) {
    const End end = fail("run", "cuLaunchKernel", 1, kPlain, kind);
    EXPECT_TRUE(end.says("failed: cuLaunchKernel 2 \n") && end.says("again: ok")) << end.output;
    const End sticky = fail("run", "cuLaunchKernel", 1, kSticky, kind);
    EXPECT_TRUE(sticky.says("failed: cuLaunchKernel 719 sticky")) << sticky.output;
  }
  const End later = fail("run", "cuLaunchKernel", 1, kSticky, "later");
  EXPECT_TRUE(later.says("failed: cuEventSynchronize 719 sticky")) << later.output;
}

TEST_F(Failures, ThatOnlySayHowPeersAreReachedAreNone) {
  for (const char* code : {"704", "711"}) {  // enabled already, too many peers
    const End end = fail("prepared", "cuCtxEnablePeerAccess", 1, code, "refuse");
    EXPECT_FALSE(end.says("not prepared")) << end.output;
    EXPECT_TRUE(end.says("again: ok")) << end.output;
  }
}

TEST_F(Failures, InRunningNameTheCallAndLeaveTheCopierUsable) {
  for (const char* function : {"cuCtxPushCurrent", "cuStreamWaitEvent", "cuMemcpyBatchAsync",
                               "cuEventRecord", "cuEventSynchronize"}) {
    for (const char* kind : {"refuse", "after"}) {
      for (int k = 1; k <= 3; ++k) {
        const End end = fail("run", function, k, kPlain, kind);
        EXPECT_TRUE(end.says(std::string("failed: ") + function + " 2 \n")) << end.output;
        EXPECT_TRUE(end.says("again: ok")) << end.output;
        // Two waits of the first stream, and the first copy.
        const bool before_any_copy =
            (std::string_view(function) == "cuStreamWaitEvent" && k <= 2) ||
            (std::string_view(function) == "cuCtxPushCurrent" && k == 1);
        EXPECT_EQ(end.says("untouched"), before_any_copy) << function << ' ' << k << end.output;
      }
    }
  }
  for (int k = 1; k <= 4; ++k) {
    const End end =
        fail("run", "cuMemcpyAsync", k, kPlain, "after", {{"FAKECUDA_DRIVER_VERSION", "12000"}});
    EXPECT_TRUE(end.says("failed: cuMemcpyAsync 2 \n")) << end.output;
    EXPECT_TRUE(end.says("again: ok")) << end.output;
  }
}

TEST_F(Failures, ThatSurfaceLaterAreOfTheCallThatWaits) {
  for (const char* function : {"cuStreamWaitEvent", "cuMemcpyBatchAsync", "cuEventRecord"}) {
    for (const char* code : {kPlain, kSticky}) {
      const End end = fail("run", function, 1, code, "later");
      EXPECT_TRUE(end.says(std::string("failed: cuEventSynchronize ") + code + " sticky"))
          << end.output;
      EXPECT_TRUE(end.says("again: the same")) << end.output;
    }
  }
}

TEST_F(Failures, ThatAreStickyEndAllCopying) {
  for (const char* function : {"cuCtxPushCurrent", "cuStreamWaitEvent", "cuMemcpyBatchAsync",
                               "cuEventRecord", "cuEventSynchronize"}) {
    for (const char* kind : {"refuse", "after"}) {
      const End end = fail("run", function, 1, kSticky, kind);
      EXPECT_TRUE(end.says(std::string("failed: ") + function + " 719 sticky")) << end.output;
      EXPECT_TRUE(end.says("again: the same")) << end.output;
    }
  }
}

TEST_F(Failures, AfterWhichTheDriverDoesNotAnswerAreTakenAsSticky) {
  const End end = run("failure", {{"FAULT_PHASE", "run"},
                                  {"FAULT", "cuMemcpyBatchAsync#1=2:after;cuStreamSynchronize=2"}});
  EXPECT_EQ(end.code, 0) << end.output;
  EXPECT_TRUE(end.says("failed: cuMemcpyBatchAsync 2 sticky")) << end.output;
  EXPECT_TRUE(end.says("again: the same")) << end.output;
}

TEST_F(Failures, InGivingBackHurtNobody) {
  for (const char* function : {"cuCtxPopCurrent", "cuEventDestroy", "cuStreamDestroy"}) {
    for (const char* kind : {"refuse", "after"}) {
      const End end = fail("run", function, 1, kPlain, kind);
      EXPECT_TRUE(end.says("run: ok")) << end.output;
      EXPECT_TRUE(end.says("again: ok")) << end.output;
    }
  }
}

TEST_F(Failures, OfTheReaderNameTheCall) {
  for (const char* function :
       {"cuCtxPushCurrent", "cuMemcpyAsync", "cuEventRecord", "cuEventSynchronize"}) {
    for (const char* kind : {"refuse", "after"}) {
      const End end = fail("read", function, 1, kPlain, kind);
      EXPECT_TRUE(end.says("read: ") && end.says(function) && end.says("(2)")) << end.output;
      EXPECT_TRUE(end.says("again: ok")) << end.output;
    }
    const End end = fail("read", function, 1, kSticky, "refuse");
    EXPECT_TRUE(end.says(function) && end.says("(719)")) << end.output;
    EXPECT_TRUE(end.says("again: ")) << end.output;
    EXPECT_FALSE(end.says("again: ok")) << end.output;
  }
}

}  // namespace
}  // namespace refit::cuda::test

int main(int argc, char** argv) {
  const std::string program = argv[0];
  ::testing::InitGoogleTest(&argc, argv);
  if (program == "device_copier_scenario") return refit::cuda::test::run_scenario(argv[1]);
  return RUN_ALL_TESTS();
}
