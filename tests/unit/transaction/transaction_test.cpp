// The transaction over its shared words: what it stores when, which answers count, and that a
// withdrawing engine and a writing daemon never both proceed.

#include "transaction/transaction.hpp"

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <random>
#include <thread>

#include "support/effort.hpp"

namespace refit::daemon {
namespace {

using Readiness = Transaction::Readiness;

/// What an engine's session holds of the words.
struct EngineWords {
  std::atomic<std::uint64_t> gate{0};
  std::atomic<std::uint64_t> answer{0};
  std::uint64_t epoch = 0;
  std::array<ModuleBlock, 2> modules{};

  GateEndpoint endpoint() { return {&gate, &answer, &epoch}; }
  void reply(AnswerState state) { reply(state, GateWord::unpack(gate.load()).epoch); }
  void reply(AnswerState state, std::uint64_t of_epoch) {
    answer.store(AnswerWord{of_epoch, state}.pack());
  }
  [[nodiscard]] GateWord asked() const { return GateWord::unpack(gate.load()); }
  [[nodiscard]] ModuleReading module(std::size_t index) const {
    return read_module(modules[index]);
  }
};

class TransactionTest : public ::testing::Test {
 protected:
  TransactionTest() {
    for (EngineWords* engine : {&first_, &second_}) {
      for (ModuleBlock& block : engine->modules) {
        block.word.store(fill_next_record(block, 0, ModuleState::initial, {}, 0).pack());
      }
    }
    sut_.reset(id_);
    const std::size_t a = sut_.add_engine(first_.endpoint());
    const std::size_t b = sut_.add_engine(second_.endpoint());
    sut_.add_module(a, first_.modules[0], 1);
    sut_.add_module(a, first_.modules[1], 5);
    sut_.add_module(b, second_.modules[0], 9);
  }

  void expect_states(ModuleState expected) {
    EXPECT_EQ(first_.module(0).word.state, expected);
    EXPECT_EQ(first_.module(1).word.state, expected);
    EXPECT_EQ(second_.module(0).word.state, expected);
    EXPECT_EQ(second_.module(1).word.state, ModuleState::initial) << "not of this transaction";
  }

  const TransactionId id_{11, 22};
  EngineWords first_;
  EngineWords second_;
  Transaction sut_;
};

TEST_F(TransactionTest, PrepareAsksEveryEngineWithItsNextEpoch) {
  second_.epoch = 41;
  sut_.prepare(GateWord::kResetCaches);
  EXPECT_EQ(first_.asked().state, GateState::prepare);
  EXPECT_EQ(first_.asked().epoch, 1U);
  EXPECT_EQ(second_.asked().epoch, 42U);
  EXPECT_EQ(second_.asked().flags, GateWord::kResetCaches);
  EXPECT_EQ(first_.epoch, 1U);
  EXPECT_EQ(second_.epoch, 42U);
  expect_states(ModuleState::initial);
}

TEST_F(TransactionTest, IsReadyOnceEveryEngineIs) {
  sut_.prepare(0);
  EXPECT_EQ(sut_.readiness(), Readiness::waiting);
  first_.reply(AnswerState::ready);
  EXPECT_EQ(sut_.readiness(), Readiness::waiting);
  EXPECT_TRUE(sut_.ready(0));
  EXPECT_FALSE(sut_.ready(1));
  second_.reply(AnswerState::ready);
  EXPECT_EQ(sut_.readiness(), Readiness::all_ready);
}

TEST_F(TransactionTest, UndonePutsEveryWordBackWithItsRecord) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  const std::uint64_t before = first_.modules[0].word.load();
  ASSERT_TRUE(sut_.begin_writing());
  expect_states(ModuleState::writing);
  sut_.undo();
  sut_.release();
  expect_states(ModuleState::initial);
  EXPECT_EQ(first_.modules[0].word.load(), before);
  EXPECT_EQ(first_.module(0).version, 0U);
  EXPECT_EQ(first_.asked().state, GateState::released);
}

TEST_F(TransactionTest, OneEngineThatStepsBackEndsTheWaiting) {
  sut_.prepare(0);
  second_.reply(AnswerState::withdrawn);
  EXPECT_EQ(sut_.readiness(), Readiness::withdrawn) << "the other engine's answer changes nothing";
  first_.reply(AnswerState::ready);
  EXPECT_EQ(sut_.readiness(), Readiness::withdrawn);
}

TEST_F(TransactionTest, AnswersToOtherEpochsSayNothing) {
  first_.reply(AnswerState::ready, 1);
  second_.reply(AnswerState::withdrawn, 1);
  first_.epoch = 1;
  second_.epoch = 1;
  sut_.prepare(0);
  EXPECT_EQ(sut_.readiness(), Readiness::waiting) << "answers of the question before";
  EXPECT_FALSE(sut_.ready(0));
  first_.reply(AnswerState::ready, 3);
  second_.reply(AnswerState::ready, 3);
  EXPECT_EQ(sut_.readiness(), Readiness::waiting) << "answers to a question never asked";
  EXPECT_FALSE(sut_.begin_writing());
  expect_states(ModuleState::initial);
}

TEST_F(TransactionTest, HostileAnswerStateIsNoAnswer) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.answer.store(AnswerWord{1, static_cast<AnswerState>(77)}.pack());
  EXPECT_EQ(sut_.readiness(), Readiness::waiting);
}

TEST_F(TransactionTest, WritingStandsInEveryWordBeforeAnyByte) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  ASSERT_TRUE(sut_.begin_writing());
  expect_states(ModuleState::writing);
  EXPECT_EQ(first_.module(1).version, 5U);
  EXPECT_EQ(first_.module(1).transaction, id_);
  EXPECT_EQ(second_.module(0).word.epoch, second_.epoch);
  EXPECT_EQ(first_.asked().state, GateState::prepare) << "the gate stays shut";
}

TEST_F(TransactionTest, EngineThatStepsBackAtTheLastMomentPutsEveryWordBack) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  ASSERT_EQ(sut_.readiness(), Readiness::all_ready);
  second_.reply(AnswerState::withdrawn);
  EXPECT_FALSE(sut_.begin_writing());
  expect_states(ModuleState::initial);
  EXPECT_EQ(first_.module(1).version, 0U);
  EXPECT_TRUE(first_.module(1).transaction.is_zero());
}

TEST_F(TransactionTest, CommitNamesVersionAndTransactionAndReleaseOpensTheGates) {
  sut_.prepare(GateWord::kResetCaches);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  ASSERT_TRUE(sut_.begin_writing());
  sut_.commit();
  expect_states(ModuleState::committed);
  EXPECT_EQ(first_.module(0).version, 1U);
  EXPECT_EQ(second_.module(0).version, 9U);
  EXPECT_EQ(second_.module(0).transaction, id_);
  EXPECT_EQ(second_.module(0).word.epoch, second_.epoch);
  EXPECT_EQ(first_.asked().state, GateState::prepare);
  sut_.release();
  for (const EngineWords* engine : {&first_, &second_}) {
    EXPECT_EQ(engine->asked().state, GateState::released);
    EXPECT_EQ(engine->asked().epoch, engine->epoch);
    EXPECT_EQ(engine->asked().flags, GateWord::kResetCaches);
  }
}

TEST_F(TransactionTest, PoisonSaysSoInEveryWordAndNamesTheTransaction) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  ASSERT_TRUE(sut_.begin_writing());
  sut_.poison();
  expect_states(ModuleState::poisoned);
  EXPECT_EQ(first_.module(0).transaction, id_);
}

TEST_F(TransactionTest, CalledOffOpensTheGatesAndChangesNothing) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  sut_.release();
  EXPECT_EQ(first_.asked().state, GateState::released);
  EXPECT_EQ(second_.asked().state, GateState::released);
  expect_states(ModuleState::initial);
}

TEST_F(TransactionTest, ResetForgetsEnginesModulesAndAnswers) {
  sut_.prepare(0);
  first_.reply(AnswerState::ready);
  second_.reply(AnswerState::ready);
  ASSERT_TRUE(sut_.begin_writing());
  sut_.commit();
  sut_.release();
  const TransactionId next{33, 44};
  sut_.reset(next);
  sut_.add_module(sut_.add_engine(first_.endpoint()), first_.modules[0], 2);
  sut_.prepare(0);
  EXPECT_EQ(sut_.readiness(), Readiness::waiting);
  first_.reply(AnswerState::ready);
  ASSERT_TRUE(sut_.begin_writing());
  sut_.commit();
  EXPECT_EQ(first_.module(0).version, 2U);
  EXPECT_EQ(first_.module(0).transaction, next);
  EXPECT_EQ(first_.module(1).version, 5U);
  EXPECT_EQ(second_.module(0).transaction, id_);
}

/// The engine's side of the agreement in its smallest form, as client/src/gate.cpp has it.
class SmallEngine {
 public:
  SmallEngine(EngineWords& words, std::uint64_t seed) : words_(words), random_(seed) {}

  /// One turn between two steps: answers, waits, perhaps steps back. True: a step may run now.
  bool may_step(const std::atomic<bool>& stop) {
    if (!holding_) {
      const GateWord gate = words_.asked();
      if (gate.state != GateState::prepare || gate.epoch <= answered_) return true;
      answered_ = gate.epoch;
      holding_ = true;
      words_.reply(AnswerState::ready, answered_);
    }
    const std::uint64_t patience = random_() % 256;
    for (std::uint64_t reads = 0; !stop.load(); ++reads) {
      const GateWord gate = words_.asked();
      if (gate.epoch != answered_ || gate.state != GateState::prepare) {
        holding_ = false;
        return true;
      }
      if (reads == patience) return withdraw();
      if (reads % 64 == 63) std::this_thread::yield();
    }
    return false;
  }
  [[nodiscard]] std::uint64_t withdrawals() const { return withdrawals_; }

 private:
  bool withdraw() {
    words_.reply(AnswerState::withdrawn, answered_);
    for (const ModuleBlock& block : words_.modules) {
      if (ModuleWord::unpack(block.word.load()).state == ModuleState::writing) return false;
    }
    holding_ = false;
    ++withdrawals_;
    return true;
  }

  EngineWords& words_;
  std::mt19937_64 random_;
  std::uint64_t answered_ = 0;
  std::uint64_t withdrawals_ = 0;
  bool holding_ = false;
};

// Goal: in no interleaving do a step and a write overlap. Method: the real Transaction on one
// thread against an engine on another that steps back after a random number of reads, over plain
// memory: every element of the weights must be one value in every step, and TSan reports any
// overlap that the values happen to hide. Both outcomes must have come up often, or nothing was
// tested.
TEST(TransactionStress, WithdrawalAndWritingNeverBothProceed) {
  constexpr std::uint64_t kRounds = test::rounds(100'000);
  auto words = std::make_unique<EngineWords>();
  for (ModuleBlock& block : words->modules) {
    block.word.store(fill_next_record(block, 0, ModuleState::initial, {}, 0).pack());
  }
  std::array<std::uint64_t, 16> weights{};
  std::atomic<bool> stop{false};
  std::uint64_t steps = 0;
  std::uint64_t mixes = 0;
  SmallEngine engine(*words, 20240607);
  std::thread stepping([&] {
    while (!stop.load()) {
      if (!engine.may_step(stop)) continue;
      const std::uint64_t first = weights.front();
      for (const std::uint64_t weight : weights) mixes += weight != first;
      ++steps;
    }
  });

  Transaction sut;
  std::uint64_t commits = 0;
  std::uint64_t called_off = 0;
  std::uint64_t lost_races = 0;
  for (std::uint64_t round = 1; round <= kRounds; ++round) {
    sut.reset({round, round});
    const std::size_t index = sut.add_engine(words->endpoint());
    for (ModuleBlock& block : words->modules) sut.add_module(index, block, commits + 1);
    sut.prepare(0);
    for (int reads = 0; sut.readiness() == Readiness::waiting; ++reads) {
      if (reads % 256 == 255) std::this_thread::yield();
    }
    if (sut.readiness() == Readiness::all_ready) {
      // Lets the race for the last word happen: without a pause the daemon wins nearly always.
      for (std::uint64_t pause = 0; pause < round % 128; ++pause) (void)words->gate.load();
      if (sut.begin_writing()) {
        for (std::uint64_t& weight : weights) weight = round;
        sut.commit();
        ++commits;
      } else {
        ++lost_races;
      }
    } else {
      ++called_off;
    }
    sut.release();
  }
  stop.store(true);
  stepping.join();
  RecordProperty("commits", std::to_string(commits));
  RecordProperty("lost_races", std::to_string(lost_races));
  RecordProperty("withdrawals", std::to_string(engine.withdrawals()));
  EXPECT_EQ(mixes, 0U);
  EXPECT_GT(commits, kRounds / 100);
  EXPECT_GT(called_off + lost_races, 0U);
  EXPECT_GT(engine.withdrawals(), 0U);
  EXPECT_GT(steps, 0U);
  EXPECT_EQ(read_module(words->modules[0]).version, commits);
  EXPECT_EQ(read_module(words->modules[1]).version, commits);
}

}  // namespace
}  // namespace refit::daemon
