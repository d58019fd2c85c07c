// The trial among copy kernels: every candidate gets its turns, the fastest is chosen, once.
//
// One thread; times are given, never measured.
#include "memory/kernel_trial.hpp"

#include <gtest/gtest.h>

#include <map>

namespace refit {
namespace {

void copy_nothing(void*, const void*, std::size_t) noexcept {}

constexpr std::uint64_t kChunk = std::uint64_t{1} << 20;
const CopyKernel kPlain{"plain", copy_nothing, true};
const CopyKernel kAhead{"ahead", copy_nothing, true};
const CopyKernel kRep{"rep", copy_nothing, true};
constexpr std::array kAll{&kPlain, &kAhead, &kRep};
constexpr CopyCandidates kThree{{kAll[0], kAll[1], kAll[2]}, kAll.size()};

/// Runs a trial to its end, each candidate taking the given time for a chunk; returns the turns.
std::map<const CopyKernel*, int> run(KernelTrial& sut,
                                     const std::map<const CopyKernel*, std::uint64_t>& ns) {
  std::map<const CopyKernel*, int> turns;
  for (int i = 0; i < 100'000 && !sut.over(); ++i) {
    bool timed = false;
    const CopyKernel& kernel = sut.next(kChunk, timed);
    EXPECT_TRUE(timed);
    ++turns[&kernel];
    sut.record(kernel, kChunk, ns.at(&kernel));
  }
  EXPECT_TRUE(sut.over());
  return turns;
}

TEST(KernelTrial, FastestCandidateIsChosen) {
  for (const CopyKernel* fastest : kAll) {
    KernelTrial sut(kThree);
    EXPECT_EQ(&sut.chosen(), &kPlain) << "the first is the guess until the trial is over";
    std::map<const CopyKernel*, std::uint64_t> ns{
        {&kPlain, 100'000}, {&kAhead, 100'000}, {&kRep, 100'000}};
    ns[fastest] = 90'000;
    run(sut, ns);
    EXPECT_EQ(&sut.chosen(), fastest) << fastest->name;
  }
}

TEST(KernelTrial, GainThatMayBeNoiseLeavesTheFirst) {
  KernelTrial sut(kThree);
  run(sut, {{&kPlain, 100'000}, {&kAhead, 99'000}, {&kRep, 98'500}});
  EXPECT_EQ(&sut.chosen(), &kPlain);
}

TEST(KernelTrial, EveryCandidateGetsAboutAsManyTurns) {
  KernelTrial sut(kThree);
  const auto turns = run(sut, {{&kPlain, 1}, {&kAhead, 1}, {&kRep, 1}});
  const int least = static_cast<int>(KernelTrial::kTrialBytes / kChunk);
  for (const CopyKernel* kernel : kAll) {
    EXPECT_GE(turns.at(kernel), least) << kernel->name;
    EXPECT_LE(turns.at(kernel), least + least / 4) << kernel->name;
  }
}

TEST(KernelTrial, ShortChunksAreNotTimedAndTakeTheGuess) {
  KernelTrial sut(kThree);
  bool timed = true;
  EXPECT_EQ(&sut.next(KernelTrial::kChunkBytesMin - 1, timed), &kPlain);
  EXPECT_FALSE(timed);
}

TEST(KernelTrial, ChoiceStands) {
  KernelTrial sut(kThree);
  run(sut, {{&kPlain, 100}, {&kAhead, 50}, {&kRep, 100}});
  sut.record(kRep, kChunk * 100'000, 1);
  bool timed = true;
  EXPECT_EQ(&sut.next(kChunk, timed), &kAhead);
  EXPECT_FALSE(timed);
  EXPECT_EQ(&sut.chosen(), &kAhead);
}

TEST(KernelTrial, OneCandidateNeedsNoTrial) {
  KernelTrial sut(CopyCandidates{{&kPlain}, 1});
  EXPECT_TRUE(sut.over());
  EXPECT_EQ(&sut.chosen(), &kPlain);
}

}  // namespace
}  // namespace refit
