// The state word of a module and the two gate words of an engine: the whole agreement on when bytes
// may change.
//
// The daemon writes ModuleBlocks and the gate word (response region), the engine writes its answer
// (request region); either reads the other's. All operations are sequentially consistent: before
// `writing` each side stores its own word and then loads the other's, so at least one of a
// withdrawing engine and a writing daemon sees the other and steps back. Pure: no syscall, no
// clock, so the simulation runs this very code.
#pragma once

#include <cstdint>

#include "ipc/shared_layout.hpp"
#include "refit/types.hpp"

namespace refit {

/// {epoch:48, record:8, state:8}. `record` names the ModuleRecord that belongs to this word.
struct ModuleWord {
  std::uint64_t epoch = 0;
  std::uint8_t record = 0;
  ModuleState state = ModuleState::none;

  [[nodiscard]] std::uint64_t pack() const noexcept {
    return epoch << 16 | std::uint64_t{record} << 8 | static_cast<std::uint64_t>(state);
  }
  static ModuleWord unpack(std::uint64_t word) noexcept {
    return {word >> 16, static_cast<std::uint8_t>((word >> 8) & 1),
            static_cast<ModuleState>(word & 0xff)};
  }
};

/// One consistent reading of a module's block.
struct ModuleReading {
  ModuleWord word;
  TransactionId transaction;
  std::uint64_t version = 0;
  std::uint64_t selection = 0;  ///< which tensors the transaction writes; 0 if nobody knows
};

/// Reader's side. A record is rewritten only while the word points at the other one, so a word that
/// is the same before and after vouches for the record between.
inline ModuleReading read_module(const ModuleBlock& block) noexcept {
  for (;;) {
    const std::uint64_t before = block.word.load();
    ModuleReading reading;
    reading.word = ModuleWord::unpack(before);
    const ModuleRecord& record = block.records[reading.word.record];
    reading.transaction = {record.transaction_high.load(), record.transaction_low.load()};
    reading.version = record.version.load();
    reading.selection = record.selection.load();
    if (block.word.load() == before) return reading;
  }
}

/// Writer's side (daemon only): fills the record that the current word does not use and returns the
/// word that names it.
inline ModuleWord fill_next_record(ModuleBlock& block, std::uint64_t epoch, ModuleState state,
                                   const TransactionId& transaction, std::uint64_t version,
                                   std::uint64_t selection = 0) noexcept {
  const ModuleWord current = ModuleWord::unpack(block.word.load());
  const auto next = static_cast<std::uint8_t>(current.record ^ 1);
  ModuleRecord& record = block.records[next];
  record.transaction_high.store(transaction.high);
  record.transaction_low.store(transaction.low);
  record.version.store(version);
  record.selection.store(selection);
  return ModuleWord{epoch, next, state};
}

enum class GateState : std::uint8_t {
  closed = 0,   ///< nothing is asked
  prepare = 1,  ///< the engine shall stop between two steps and answer ready
  released =
      2,  ///< the engine may go on; what was committed stands in the state words with this epoch
};

/// {epoch:48, flags:8, state:8} of the daemon.
struct GateWord {
  static constexpr std::uint8_t kLongCopy = 1;  ///< the copy takes long: block at once, do not spin
  static constexpr std::uint8_t kResetCaches =
      2;  ///< the engine shall drop what it derived from the old weights

  std::uint64_t epoch = 0;
  std::uint8_t flags = 0;
  GateState state = GateState::closed;

  [[nodiscard]] std::uint64_t pack() const noexcept {
    return epoch << 16 | std::uint64_t{flags} << 8 | static_cast<std::uint64_t>(state);
  }
  static GateWord unpack(std::uint64_t word) noexcept {
    return {word >> 16, static_cast<std::uint8_t>(word >> 8), static_cast<GateState>(word & 0xff)};
  }
};

enum class AnswerState : std::uint8_t { none = 0, ready = 1, withdrawn = 2 };

/// {epoch:48, zero:8, state:8} of the engine. One of another epoch than the one asked means
/// nothing.
struct AnswerWord {
  std::uint64_t epoch = 0;
  AnswerState state = AnswerState::none;

  [[nodiscard]] std::uint64_t pack() const noexcept {
    return epoch << 16 | static_cast<std::uint64_t>(state);
  }
  static AnswerWord unpack(std::uint64_t word) noexcept {
    return {word >> 16, static_cast<AnswerState>(word & 0xff)};
  }
};

}  // namespace refit
