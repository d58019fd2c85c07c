// One transaction over the shared words: prepare, all ready, writing, committed or stepped back.
//
// Pure: no syscall, no clock, no ring; it stores and loads the atomics that it is given and decides
// nothing by itself. One thread. The server drives it; the simulation drives the same code. What
// the words mean: core/ipc/state_word.hpp.
#pragma once

#include <cstdint>
#include <vector>

#include "ipc/shared_layout.hpp"
#include "ipc/state_word.hpp"
#include "refit/types.hpp"

namespace refit::daemon {

/// One engine's gate as the daemon sees it. `epoch` is the engine's own counter and grows with
/// every prepare.
struct GateEndpoint {
  SharedWord<std::uint64_t>* gate = nullptr;          ///< in the response region
  const SharedWord<std::uint64_t>* answer = nullptr;  ///< in the request region
  std::uint64_t* epoch = nullptr;
};

class Transaction {
 public:
  /// Forgets everything; keeps its memory, so that a steady refit allocates nothing.
  void reset(const TransactionId& id) noexcept;
  /// Adds an engine and returns its index. Add engines in name order, so that two transactions
  /// never wait crosswise.
  std::size_t add_engine(const GateEndpoint& endpoint);
  /// Adds a module of engine `engine`, which becomes `version` when it commits.
  void add_module(std::size_t engine, ModuleBlock& block, std::uint64_t version,
                  std::uint64_t selection = 0);

  /// Asks every engine to hold still.
  void prepare(std::uint8_t gate_flags);

  enum class Readiness { waiting, all_ready, withdrawn };
  [[nodiscard]] Readiness readiness() const;
  /// True if this engine answered ready for this transaction's epoch.
  [[nodiscard]] bool ready(std::size_t engine) const;
  /// True if this engine stepped back from this transaction's epoch.
  [[nodiscard]] bool withdrawn(std::size_t engine) const;

  /// Stores `writing` in every word, then looks at the engines once more. False if one of them
  /// withdrew: every word is back at what it was, and no byte may be written. True: from now on
  /// only commit(), poison() or undo() follow.
  [[nodiscard]] bool begin_writing();

  /// After the last byte: stores `committed` in every word. Each store is that module's commit
  /// point.
  void commit();
  /// The bytes may be a mix: says so in every word.
  void poison();
  /// Not one byte was written: every word is back at what it was.
  void undo();
  /// Opens the gates. After commit, poison or undo, or instead of begin_writing to call the whole
  /// thing off.
  void release();

  [[nodiscard]] const TransactionId& id() const noexcept { return id_; }

 private:
  struct EngineGate {
    GateEndpoint endpoint;
    std::uint64_t epoch = 0;
  };
  struct ModuleWrite {
    std::size_t engine = 0;
    ModuleBlock* block = nullptr;
    std::uint64_t version = 0;
    std::uint64_t selection = 0;
    std::uint64_t word_before = 0;
    ModuleWord word;
  };
  [[nodiscard]] AnswerState answer(const EngineGate& engine) const;

  TransactionId id_;
  std::uint8_t gate_flags_ = 0;
  std::vector<EngineGate> engines_;
  std::vector<ModuleWrite> modules_;
};

}  // namespace refit::daemon
