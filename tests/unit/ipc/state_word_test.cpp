// The words that say when bytes may change: what they pack, and that a reading of a module is never
// half of one record and half of the next.

#include "ipc/state_word.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>

namespace refit {
namespace {

constexpr std::uint64_t kEpochMax = (std::uint64_t{1} << 48) - 1;

TEST(ModuleWord, KeepsEveryFieldThroughPacking) {
  for (const std::uint64_t epoch : {std::uint64_t{0}, std::uint64_t{1}, kEpochMax}) {
    for (const std::uint8_t record : {std::uint8_t{0}, std::uint8_t{1}}) {
      for (const ModuleState state : {ModuleState::none, ModuleState::initial, ModuleState::writing,
                                      ModuleState::committed, ModuleState::poisoned}) {
        const ModuleWord sut = ModuleWord::unpack(ModuleWord{epoch, record, state}.pack());
        EXPECT_EQ(sut.epoch, epoch);
        EXPECT_EQ(sut.record, record);
        EXPECT_EQ(sut.state, state);
      }
    }
  }
}

TEST(ModuleWord, HasItsGoldenBits) {
  EXPECT_EQ((ModuleWord{0x1234, 1, ModuleState::committed}.pack()), 0x12340103U);
}

TEST(ModuleWord, RecordOfAHostileWordStaysInsideTheBlock) {
  EXPECT_LE(ModuleWord::unpack(~std::uint64_t{0}).record, 1U);
}

TEST(GateWord, KeepsEveryFieldThroughPacking) {
  for (const std::uint64_t epoch : {std::uint64_t{0}, std::uint64_t{7}, kEpochMax}) {
    for (const std::uint8_t flags : {std::uint8_t{0}, GateWord::kLongCopy, std::uint8_t{255}}) {
      for (const GateState state : {GateState::closed, GateState::prepare, GateState::released}) {
        const GateWord sut = GateWord::unpack(GateWord{epoch, flags, state}.pack());
        EXPECT_EQ(sut.epoch, epoch);
        EXPECT_EQ(sut.flags, flags);
        EXPECT_EQ(sut.state, state);
      }
    }
  }
}

TEST(AnswerWord, KeepsEveryFieldThroughPacking) {
  for (const std::uint64_t epoch : {std::uint64_t{0}, std::uint64_t{7}, kEpochMax}) {
    for (const AnswerState state :
         {AnswerState::none, AnswerState::ready, AnswerState::withdrawn}) {
      const AnswerWord sut = AnswerWord::unpack(AnswerWord{epoch, state}.pack());
      EXPECT_EQ(sut.epoch, epoch);
      EXPECT_EQ(sut.state, state);
    }
  }
}

TEST(ModuleBlock, NextRecordIsNeverTheOneInUse) {
  const auto block = std::make_unique<ModuleBlock>();
  for (std::uint64_t epoch = 1; epoch <= 4; ++epoch) {
    const ModuleWord before = ModuleWord::unpack(block->word.load());
    const ModuleWord next =
        fill_next_record(*block, epoch, ModuleState::writing, {epoch, epoch}, epoch);
    EXPECT_NE(next.record, before.record);
    EXPECT_EQ(ModuleWord::unpack(block->word.load()).epoch, before.epoch)
        << "the word is the caller's to store";
    block->word.store(next.pack());
    const ModuleReading reading = read_module(*block);
    EXPECT_EQ(reading.version, epoch);
    EXPECT_EQ(reading.transaction, (TransactionId{epoch, epoch}));
    EXPECT_EQ(reading.word.state, ModuleState::writing);
  }
}

// Goal: a reader under a writer that never rests sees one record or the other, never parts of two.
// Method: every field of a record is made from its epoch, so that a torn reading contradicts
// itself. TSan watches the same run for the ordering.
TEST(ModuleBlock, ReadingIsNeverTornUnderAConcurrentWriter) {
  const auto block = std::make_unique<ModuleBlock>();
  // The reader counts, not the writer: on a busy machine either may run alone for a while.
  constexpr std::uint64_t kReadings = 200'000;
  std::atomic<bool> enough{false};
  std::atomic<std::uint64_t> written{0};
  std::thread writer([&] {
    while (!enough.load()) {
      const std::uint64_t epoch = written.load() + 1;
      ModuleWord word = fill_next_record(*block, epoch, ModuleState::writing,
                                         {epoch * 3, epoch * 5}, epoch * 7, epoch * 9);
      block->word.store(word.pack());
      word.state = ModuleState::committed;
      block->word.store(word.pack());
      written.store(epoch);
    }
  });
  std::uint64_t last = 0;
  bool torn = false;
  for (std::uint64_t readings = 0; readings < kReadings || written.load() < 1'000; ++readings) {
    const ModuleReading reading = read_module(*block);
    const std::uint64_t epoch = reading.word.epoch;
    torn = torn || reading.transaction.high != epoch * 3 || reading.transaction.low != epoch * 5 ||
           reading.version != epoch * 7 || reading.selection != epoch * 9 || epoch < last;
    last = epoch;
  }
  enough.store(true);
  writer.join();
  EXPECT_FALSE(torn);
  EXPECT_EQ(read_module(*block).version, written.load() * 7);
}

}  // namespace
}  // namespace refit
