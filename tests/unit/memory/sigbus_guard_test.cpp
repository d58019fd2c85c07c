// Faults of truncated shared memory inside and outside a guard.
//
// Threads of its own for the per-thread property; death tests in fresh processes. Knows nothing of
// copies.
#include "memory/sigbus_guard.hpp"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <thread>
#include <vector>

#include "unit/memory/cut_mapping.hpp"

namespace refit {
namespace {

using test::CutMapping;

void touch(const char* address) { (void)*static_cast<const volatile char*>(address); }

TEST(SigbusGuard, BodyWithoutFaultRunsToItsEnd) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping memory;
  char seen = 0;
  EXPECT_TRUE(
      run_guarded(memory.whole_page(), memory.bytes(), [&] { seen = *memory.whole_page(); }));
  EXPECT_EQ(seen, 1);
}

TEST(SigbusGuard, ReadFaultIsAnErrorAndEarlierWritesStay) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping memory;
  volatile int step = 0;
  EXPECT_FALSE(run_guarded(memory.whole_page(), memory.bytes(), [&] {
    step = 1;
    touch(memory.lost_page());
    step = 2;
  }));
  EXPECT_EQ(step, 1);
}

TEST(SigbusGuard, WriteFaultIsAnErrorEachTime) {
  // Goal: the handler stays usable after it was left by a jump. Method: many faults on one thread.
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping memory;
  for (int i = 0; i < 100; ++i) {
    EXPECT_FALSE(run_guarded(memory.whole_page(), memory.bytes(),
                             [&] { *static_cast<volatile char*>(memory.lost_page()) = 1; }));
  }
}

TEST(SigbusGuard, FaultInsideMemcpyIsAnError) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping memory;
  std::vector<char> target(memory.bytes());
  EXPECT_FALSE(run_guarded(memory.whole_page(), memory.bytes(), [&] {
    std::memcpy(target.data(), memory.whole_page(), target.size());
  }));
}

TEST(SigbusGuard, EachOfSeveralRangesIsCovered) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping first;
  const CutMapping second;
  const GuardedRange ranges[] = {
      {nullptr, 0}, {first.whole_page(), first.bytes()}, {second.whole_page(), second.bytes()}};
  EXPECT_FALSE(run_guarded(ranges, 3, [&] { touch(first.lost_page()); }));
  EXPECT_FALSE(run_guarded(ranges, 3, [&] { touch(second.lost_page()); }));
}

TEST(SigbusGuard, FaultGoesToTheNearestGuardThatCoversIt) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping outer;
  const CutMapping inner;
  bool inner_whole = true;
  bool after_inner = false;
  EXPECT_TRUE(run_guarded(outer.whole_page(), outer.bytes(), [&] {
    inner_whole = run_guarded(inner.whole_page(), inner.bytes(), [&] { touch(inner.lost_page()); });
    after_inner = true;
  }));
  EXPECT_FALSE(inner_whole);
  EXPECT_TRUE(after_inner);

  volatile bool went_on = false;
  EXPECT_FALSE(run_guarded(outer.whole_page(), outer.bytes(), [&] {
    (void)run_guarded(inner.whole_page(), inner.bytes(), [&] { touch(outer.lost_page()); });
    went_on = true;
  }));
  EXPECT_FALSE(went_on);
}

TEST(SigbusGuard, ThreadsFaultAtTheSameTimeWithoutMeeting) {
  ASSERT_TRUE(install_sigbus_handler());
  const CutMapping memory;
  int faults[4] = {};
  std::vector<std::thread> threads;
  for (int& mine : faults) {
    threads.emplace_back([&memory, &mine] {
      for (int i = 0; i < 200; ++i) {
        if (!run_guarded(memory.whole_page(), memory.bytes(), [&] { touch(memory.lost_page()); })) {
          ++mine;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int mine : faults) EXPECT_EQ(mine, 200);
}

// The death tests set the default action first, because a sanitizer may have installed its own.
void install_over_default() {
  std::signal(SIGBUS, SIG_DFL);
  if (!install_sigbus_handler()) std::abort();
}

TEST(SigbusGuardDeath, FaultOutsideAGuardKills) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_over_default();
        const CutMapping memory;
        touch(memory.lost_page());
      },
      testing::KilledBySignal(SIGBUS), "");
}

TEST(SigbusGuardDeath, FaultAfterTheGuardKills) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_over_default();
        const CutMapping memory;
        if (!run_guarded(memory.whole_page(), memory.bytes(), [&] { touch(memory.lost_page()); })) {
          touch(memory.lost_page());
        }
      },
      testing::KilledBySignal(SIGBUS), "");
}

TEST(SigbusGuardDeath, FaultAtAnUncoveredAddressKills) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_over_default();
        const CutMapping memory;
        (void)run_guarded(memory.whole_page(), CutMapping::page_bytes(),
                          [&] { touch(memory.lost_page()); });
      },
      testing::KilledBySignal(SIGBUS), "");
}

TEST(SigbusGuardDeath, SentSignalKillsEvenInsideAGuard) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        install_over_default();
        const CutMapping memory;
        (void)run_guarded(memory.whole_page(), memory.bytes(), [] { raise(SIGBUS); });
      },
      testing::KilledBySignal(SIGBUS), "");
}

TEST(SigbusGuardDeath, PreviousHandlerGetsWhatNoGuardCovers) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_EXIT(
      {
        std::signal(SIGBUS, [](int) { _exit(42); });
        if (!install_sigbus_handler() || !install_sigbus_handler()) std::abort();
        const CutMapping memory;
        touch(memory.lost_page());
      },
      testing::ExitedWithCode(42), "");
}

}  // namespace
}  // namespace refit
