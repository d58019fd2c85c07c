// The simulation as a test: many seeds against the model, each rerun exactly from its number, and
// bugs that were planted on purpose are found.
//
// REFIT_SIM_SEEDS=N in the environment runs N seeds instead, for a night.

#include <gtest/gtest.h>

#include <cinttypes>
#include <cstdlib>
#include <ostream>

#include "world.hpp"

namespace refit::sim {
namespace {

#if defined(__SANITIZE_ADDRESS__)
constexpr std::uint64_t kSeeds = 200;
#else
constexpr std::uint64_t kSeeds = 1000;
#endif
/// The rarest of them takes some 1,700.
constexpr std::uint64_t kSeedsPerBug = 5000;
/// In so many every kind of event comes up.
constexpr std::uint64_t kSeedsForAllKinds = 1000;

std::uint64_t seeds() {
  const char* wanted = std::getenv("REFIT_SIM_SEEDS");
  return wanted == nullptr ? kSeeds : std::strtoull(wanted, nullptr, 10);
}

// Goal: whatever dies, sleeps or is late at whatever step, nothing happens that the model forbids,
// and in the calm afterwards everybody is served. Method: one run per seed; and because a run in
// which nothing happens proves nothing, every kind of event must have come up.
TEST(Simulation, HoldsWhatTheModelSaysAtEverySeed) {
  Counts counts;
  std::uint64_t turns = 0;
  const std::uint64_t count = seeds();
  for (std::uint64_t seed = 1; seed <= count; ++seed) {
    const Outcome outcome = simulate({seed, false, {}});
    ASSERT_EQ(outcome.violation, "") << "see it happen: refit_sim --seed " << seed << " --trace";
    counts.add(outcome.counts);
    turns += outcome.turns;
  }
  std::printf("%" PRIu64 " seeds, %" PRIu64 " turns\n", count, turns);
  for (const auto& [what, times] : counts.of)
    std::printf("%12" PRIu64 "  %s\n", times, what.c_str());
  if (count < kSeedsForAllKinds) return;
  for (const char* what : {"answered from the record",
                           "answered ok",
                           "calls that ended with daemon_gone",
                           "calls that ended with deadline",
                           "commits",
                           "deadlines in writing",
                           "deaths of daemons",
                           "deaths of engines",
                           "deaths of trainers",
                           "engine steps",
                           "engines that left and came back",
                           "freezes",
                           "gate events",
                           "gates that outlived their daemon",
                           "poisoned",
                           "poisoned modules written",
                           "questions refused",
                           "refused: engine_gone",
                           "refused: engine_not_ready",
                           "refused: no_such_engine",
                           "refused: poisoned",
                           "registered as poisoned",
                           "registrations in doubt",
                           "registrations of engines",
                           "sent again while it is written",
                           "stepped back from writing",
                           "steps not allowed",
                           "withdrawals",
                           "words to writing"}) {
    EXPECT_GT(counts[what], 0U) << what << " never happened";
  }
}

// Goal: a number is enough to see a failure again. Method: every choice and every event of two runs
// of one seed, and no two seeds alike.
TEST(Simulation, SeedIsRerunExactlyFromItsNumber) {
  std::uint64_t last = 0;
  for (std::uint64_t seed = 1; seed <= 25; ++seed) {
    const Outcome once = simulate({seed, false, {}});
    const Outcome again = simulate({seed, false, {}});
    EXPECT_EQ(once.hash, again.hash) << "seed " << seed;
    EXPECT_EQ(once.turns, again.turns);
    EXPECT_EQ(once.counts.of, again.counts.of);
    EXPECT_NE(once.hash, last);
    last = once.hash;
  }
}

struct PlantedBug {
  const char* name;
  const char* what;
  friend std::ostream& operator<<(std::ostream& out, const PlantedBug& bug) {
    return out << bug.what;
  }
};

class SimulationOfABug : public ::testing::TestWithParam<PlantedBug> {};

// Goal: the model is sharp enough. Method: the same code with one bug planted, until a seed finds
// it, and the same seed finds it again.
TEST_P(SimulationOfABug, IsFound) {
  for (std::uint64_t seed = 1; seed <= kSeedsPerBug; ++seed) {
    const Outcome outcome = simulate({seed, false, GetParam().name});
    if (outcome.violation.empty()) continue;
    std::printf("%s: found by seed %" PRIu64 ": %s\n", GetParam().what, seed,
                outcome.violation.c_str());
    EXPECT_EQ(simulate({seed, false, GetParam().name}).violation, outcome.violation);
    return;
  }
  FAIL() << GetParam().what << ": not found in " << kSeedsPerBug << " seeds";
}

INSTANTIATE_TEST_SUITE_P(
    Planted, SimulationOfABug,
    ::testing::Values(
        PlantedBug{"engine.clears_pending_after_committed",
                   "an engine clears the next question after `committed`"},
        PlantedBug{"copy.done_before_the_last_byte",
                   "the daemon stores `committed` before the last byte"},
        PlantedBug{"engine.leaves_writing_by_its_own_clock",
                   "an engine leaves `writing` by its own clock"},
        PlantedBug{"engine.withdraws_without_a_look",
                   "an engine steps back and does not look at the words"},
        PlantedBug{"engine.forgets_poison", "an engine forgets poison when it comes back"},
        PlantedBug{"engine.forgets_doubt",
                   "an engine forgets a module whose registration was never answered"},
        PlantedBug{"refits.sent_again",
                   "the daemon refuses a transaction that an earlier request of it writes"},
        PlantedBug{"refits.one_look_at_a_registration",
                   "a late registration replaces the words under the next refit's copy"},
        PlantedBug{"transaction.second_look",
                   "the daemon stores `writing` and does not look at the engines again"},
        PlantedBug{"transaction.any_epoch", "the daemon takes an answer to another question"}),
    [](const auto& bug) {
      std::string name = bug.param.name;
      for (char& c : name) c = c == '.' ? '_' : c;
      return name;
    });

}  // namespace
}  // namespace refit::sim
