#include "transaction/transaction.hpp"

#include "refit/result.hpp"
#include "test_point.hpp"

namespace refit::daemon {

void Transaction::reset(const TransactionId& id) noexcept {
  id_ = id;
  gate_flags_ = 0;
  engines_.clear();
  modules_.clear();
}

std::size_t Transaction::add_engine(const GateEndpoint& endpoint) {
  engines_.push_back({endpoint, 0});
  return engines_.size() - 1;
}

void Transaction::add_module(std::size_t engine, ModuleBlock& block, std::uint64_t version,
                             std::uint64_t selection) {
  REFIT_ASSERT(engine < engines_.size());
  modules_.push_back({engine, &block, version, selection, 0, {}});
}

void Transaction::prepare(std::uint8_t gate_flags) {
  gate_flags_ = gate_flags;
  for (EngineGate& engine : engines_) {
    engine.epoch = ++*engine.endpoint.epoch;
    engine.endpoint.gate->store(GateWord{engine.epoch, gate_flags_, GateState::prepare}.pack());
  }
}

AnswerState Transaction::answer(const EngineGate& engine) const {
  const AnswerWord word = AnswerWord::unpack(engine.endpoint.answer->load());
  // An answer to an earlier question says nothing about this one.
  if (word.epoch == engine.epoch || test_point("transaction.any_epoch")) return word.state;
  return AnswerState::none;
}

bool Transaction::withdrawn(std::size_t engine) const {
  return answer(engines_[engine]) == AnswerState::withdrawn;
}

bool Transaction::ready(std::size_t engine) const {
  return answer(engines_[engine]) == AnswerState::ready;
}

Transaction::Readiness Transaction::readiness() const {
  Readiness readiness = Readiness::all_ready;
  for (const EngineGate& engine : engines_) {
    switch (answer(engine)) {
      case AnswerState::withdrawn:
        return Readiness::withdrawn;
      case AnswerState::ready:
        break;
      default:
        readiness = Readiness::waiting;
    }
  }
  return readiness;
}

bool Transaction::begin_writing() {
  for (ModuleWrite& module : modules_) {
    module.word_before = module.block->word.load();
    module.word = fill_next_record(*module.block, engines_[module.engine].epoch,
                                   ModuleState::writing, id_, module.version, module.selection);
    module.block->word.store(module.word.pack());
  }
  // Store, then load: an engine that withdraws stores its answer and then loads these words, so at
  // least one of the two sees the other. Pairs with Gate::withdraw.
  if (test_point("transaction.second_look") || readiness() == Readiness::all_ready) return true;
  undo();
  return false;
}

void Transaction::undo() {
  for (ModuleWrite& module : modules_) module.block->word.store(module.word_before);
}

void Transaction::commit() {
  for (ModuleWrite& module : modules_) {
    module.word.state = ModuleState::committed;
    module.block->word.store(module.word.pack());
    test_point("transaction.between_commits");
  }
}

void Transaction::poison() {
  for (ModuleWrite& module : modules_) {
    module.word.state = ModuleState::poisoned;
    module.block->word.store(module.word.pack());
  }
}

void Transaction::release() {
  for (const EngineGate& engine : engines_) {
    engine.endpoint.gate->store(GateWord{engine.epoch, gate_flags_, GateState::released}.pack());
  }
}

}  // namespace refit::daemon
