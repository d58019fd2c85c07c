// The model: what may be true of every engine's bytes and words, whatever dies or is late.
//
// It looks at the words at every turn and at the bytes after every piece of a copy, from outside:
// it knows what each transaction carries and nothing of how the code gets there. In a few lines:
//   - bytes change only while their module's word says `writing`, every word of the transaction
//     with it, and never during an engine's step;
//   - a word that says `initial` or `committed` stands over bytes that are exactly one weight set
//     after another's commits; anything else says `poisoned`;
//   - an engine steps on whole weights only, and they hold still while it does;
//   - versions only grow; a transaction that is known is not written again;
//   - a refit that was answered ok was committed, one that was refused wrote nothing.
#pragma once

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "ipc/segment.hpp"
#include "ipc/state_word.hpp"
#include "kernel.hpp"
#include "refit/errc.hpp"

namespace refit::sim {

struct Link;
using Tag = std::uint64_t;

/// One module as every engine and trainer of a run has it. Elements are int64: each is a tag that
/// says whose bytes it is.
struct Shape {
  std::string name;
  std::vector<TensorSpec> target;  ///< as the engine lays it out
  std::vector<TensorSpec> source;  ///< as the trainer does
  std::uint64_t cells = 0;

  [[nodiscard]] std::uint64_t bytes() const noexcept { return cells * sizeof(Tag); }
  [[nodiscard]] std::uint64_t cells_of(std::size_t tensor) const noexcept;
};

/// A client's memory of one module.
struct Memory {
  UniqueFd fd;
  Mapping mapping;
  static std::shared_ptr<Memory> of(const Shape& shape);
  [[nodiscard]] Tag* cells() const noexcept { return reinterpret_cast<Tag*>(mapping.data()); }
};

struct Target {
  std::string engine;
  std::size_t module = 0;
  std::vector<std::string> selection;  ///< empty: all

  [[nodiscard]] bool selects(const std::string& tensor) const {
    return selection.empty() ||
           std::find(selection.begin(), selection.end(), tensor) != selection.end();
  }
};

struct IdLess {
  bool operator()(const TransactionId& a, const TransactionId& b) const noexcept {
    return a.high != b.high ? a.high < b.high : a.low < b.low;
  }
};

/// What happened in a run, so that one sees that it was worth it.
struct Counts {
  std::map<std::string, std::uint64_t> of;
  std::uint64_t& operator[](const std::string& what) { return of[what]; }
  void add(const Counts& other) {
    for (const auto& [what, count] : other.of) of[what] += count;
  }
};

/// One engine process's weights, from its start to its death.
class Weights {
 public:
  struct Module {
    const Shape* shape = nullptr;
    std::shared_ptr<Memory> memory;
    std::vector<Tag> good;               ///< per tensor: what it holds whenever the module is whole
    std::vector<std::vector<Tag>> seen;  ///< per tensor: the cells as last looked at
    std::uint64_t version = 0;
    struct Commit {
      std::uint64_t version = 0;
      std::uint64_t link = 0;
      std::size_t index = 0;
    };
    std::map<TransactionId, Commit, IdLess> commits;
    std::size_t commit_count = 0;
    const ModuleBlock* block = nullptr;
    std::uint64_t word = 0;         ///< as last seen
    std::uint64_t word_before = 0;  ///< the present `writing`
    bool touched = false;           ///< bytes changed since `writing`
  };

  std::string name;
  std::shared_ptr<Process> process;
  std::vector<Module> modules;
  std::shared_ptr<Link> link;
  Time linked_at{};
  bool in_step = false;
};

class Model {
 public:
  explicit Model(Kernel& kernel);
  ~Model();
  static Model& current();

  void add_engine(std::shared_ptr<Weights> weights);
  void on_link(Weights& weights, std::shared_ptr<Link> link);
  void begin_transaction(const TransactionId& id, Tag tag, std::vector<Target> targets);

  /// Looks at every word.
  void on_turn();
  /// A piece of a copy was written.
  void on_bytes();
  /// The engine believes that it may step.
  void on_step_begin(Weights& weights);
  void on_step_end(Weights& weights);
  void on_posted(const TransactionId& id);
  void on_answered(const TransactionId& id) { transactions_.at(id).answered = true; }
  void on_ok(const TransactionId& id, std::uint64_t version);
  void on_refused(const TransactionId& id, Errc code);

  Counts counts;
  /// Set by whoever likes to kill where it hurts.
  std::function<void()> on_writing;

 private:
  struct Transaction {
    Tag tag = 0;
    std::vector<Target> targets;
    Time posted_at{};
    Time touched_at{};
    bool touched = false;
    bool answered = true;  ///< its trainer may change the source
  };
  void on_word(Weights& weights, std::size_t index, std::uint64_t before, std::uint64_t now);
  void on_commit(Weights& weights, Weights::Module& module, const ModuleReading& reading);
  void expect_whole(const Weights& weights, const Weights::Module& module, const char* when);
  [[nodiscard]] static bool whole(const Weights::Module& module);
  [[nodiscard]] const Target* target_of(const Transaction& transaction, const Weights& weights,
                                        const Weights::Module& module) const;
  /// The engine of a target that `transaction` was bound to when it was sent and that lives; null
  /// for one that came later or is gone.
  [[nodiscard]] Weights* bound_to(const Target& target, const Transaction& transaction) const;
  [[nodiscard]] std::string describe(const Weights& weights, const Weights::Module& module) const;
  void violate(const std::string& what) { kernel_.violate(what); }

  Kernel& kernel_;
  std::map<std::string, std::shared_ptr<Weights>> engines_;
  std::map<TransactionId, Transaction, IdLess> transactions_;
};

/// The tags that a tensor holds, or a sample of them where there are many.
std::vector<Tag> look(const Shape& shape, std::size_t tensor, const Memory& memory);

}  // namespace refit::sim
