#include "model.hpp"

#include <fcntl.h>

#include <algorithm>

#include "link.hpp"
#include "support/must.hpp"

namespace refit::sim {
namespace {

using test::must;

Model* current_model = nullptr;

constexpr std::uint64_t kCellsLookedAt = 64;

std::string hex(Tag tag) {
  char text[20];
  std::snprintf(text, sizeof text, "%llx", static_cast<unsigned long long>(tag));
  return text;
}

ModuleReading peek(const ModuleBlock& block) {
  ModuleReading reading;
  reading.word = ModuleWord::unpack(block.word.peek());
  const ModuleRecord& record = block.records[reading.word.record];
  reading.transaction = {record.transaction_high.peek(), record.transaction_low.peek()};
  reading.version = record.version.peek();
  return reading;
}

}  // namespace

std::uint64_t Shape::cells_of(std::size_t tensor) const noexcept {
  std::uint64_t cells_here = 1;
  for (const std::uint64_t extent : target[tensor].shape) cells_here *= extent;
  return cells_here;
}

std::shared_ptr<Memory> Memory::of(const Shape& shape) {
  auto memory = std::make_shared<Memory>();
  memory->fd = must(make_memfd("weights", shape.bytes()));
  REFIT_ASSERT(add_seals(memory->fd.get(), F_SEAL_SHRINK, "weights").has_value());
  memory->mapping =
      must(Mapping::map(memory->fd.get(), shape.bytes(), Access::read_write, "weights"));
  REFIT_ASSERT(back_with_memory(memory->fd.get(), memory->mapping, "weights").has_value());
  return memory;
}

std::vector<Tag> look(const Shape& shape, std::size_t tensor, const Memory& memory) {
  const std::uint64_t cells = shape.cells_of(tensor);
  const Tag* first = memory.cells() + shape.target[tensor].offset_bytes / sizeof(Tag);
  const std::uint64_t step = std::max<std::uint64_t>(1, cells / kCellsLookedAt);
  std::vector<Tag> tags;
  for (std::uint64_t i = 0; i < cells; i += step) tags.push_back(first[i]);
  tags.push_back(first[cells - 1]);
  return tags;
}

Model::Model(Kernel& kernel) : kernel_(kernel) { current_model = this; }
Model::~Model() { current_model = nullptr; }
Model& Model::current() { return *current_model; }

std::string Model::describe(const Weights& weights, const Weights::Module& module) const {
  const ModuleWord word = ModuleWord::unpack(module.word);
  std::string text = weights.name + "/" + module.shape->name + " (" +
                     std::string(module_state_name(word.state)) + ", version " +
                     std::to_string(module.version) + ")";
  for (std::size_t i = 0; i < module.good.size(); ++i) {
    text += " " + module.shape->target[i].name + ":";
    std::vector<Tag> tags = module.seen[i];
    tags.erase(std::unique(tags.begin(), tags.end()), tags.end());
    for (const Tag tag : tags) text += " " + hex(tag);
    text += " for " + hex(module.good[i]) + ";";
  }
  return text;
}

void Model::add_engine(std::shared_ptr<Weights> weights) {
  for (Weights::Module& module : weights->modules) {
    module.seen.clear();
    for (std::size_t i = 0; i < module.good.size(); ++i)
      module.seen.push_back(look(*module.shape, i, *module.memory));
  }
  weights->linked_at = kernel_.now();
  engines_[weights->name] = std::move(weights);
}

void Model::on_link(Weights& weights, std::shared_ptr<Link> link) {
  weights.link = std::move(link);
  weights.linked_at = kernel_.now();
  for (Weights::Module& module : weights.modules) {
    module.block = nullptr;
    module.word = 0;
  }
}

void Model::begin_transaction(const TransactionId& id, Tag tag, std::vector<Target> targets) {
  transactions_[id] = {tag, std::move(targets), {}, {}, false, true};
}

bool Model::whole(const Weights::Module& module) {
  for (std::size_t i = 0; i < module.good.size(); ++i) {
    for (const Tag tag : module.seen[i]) {
      if (tag != module.good[i]) return false;
    }
  }
  return true;
}

void Model::expect_whole(const Weights& weights, const Weights::Module& module, const char* when) {
  if (!whole(module)) violate(std::string("not whole ") + when + ": " + describe(weights, module));
}

const Target* Model::target_of(const Transaction& transaction, const Weights& weights,
                               const Weights::Module& module) const {
  const auto index = static_cast<std::size_t>(&module - weights.modules.data());
  for (const Target& target : transaction.targets) {
    if (target.engine == weights.name && target.module == index) return &target;
  }
  return nullptr;
}

Weights* Model::bound_to(const Target& target, const Transaction& transaction) const {
  const auto engine = engines_.find(target.engine);
  if (engine == engines_.end() || engine->second->process->dying ||
      engine->second->link == nullptr || engine->second->linked_at > transaction.posted_at)
    return nullptr;
  return engine->second.get();
}

void Model::on_turn() {
  for (auto& [name, weights] : engines_) {
    if (weights->process->dying || weights->link == nullptr) continue;
    const Link& link = *weights->link;
    for (std::size_t i = 0; i < weights->modules.size(); ++i) {
      Weights::Module& module = weights->modules[i];
      if (module.block == nullptr) {
        const auto session = link.session.lock();
        if (session == nullptr) continue;
        const auto found = session->modules.find(module.shape->name);
        if (found == session->modules.end()) continue;
        module.block = &link.memory->response_region().modules[found->second->slot];
      }
      const std::uint64_t now = module.block->word.peek();
      if (now == module.word) continue;
      const std::uint64_t before = std::exchange(module.word, now);
      on_word(*weights, i, before, now);
    }
  }
}

void Model::on_word(Weights& weights, std::size_t index, std::uint64_t before, std::uint64_t now) {
  Weights::Module& module = weights.modules[index];
  const ModuleState was = ModuleWord::unpack(before).state;
  const ModuleReading reading = peek(*module.block);
  kernel_.note(weights.name + " " + std::to_string(index) + " " + std::to_string(now));
  if (kernel_.tracing())
    kernel_.tell(describe(weights, module) + " by " + reading.transaction.to_string());
  switch (reading.word.state) {
    case ModuleState::none:
      return;
    case ModuleState::writing:
      ++counts["words to writing"];
      module.touched = false;
      module.word_before = before;
      if (was == ModuleState::poisoned) ++counts["poisoned modules written"];
      if (reading.version <= module.version)
        violate("a write announces a version that is not new: " + describe(weights, module));
      if (on_writing) on_writing();
      return;
    case ModuleState::committed:
      if (was == ModuleState::writing && now != module.word_before)
        return on_commit(weights, module, reading);
      [[fallthrough]];
    case ModuleState::initial:
      if (was == ModuleState::writing) {
        ++counts["stepped back from writing"];
        if (module.touched)
          violate("stepped back over bytes that changed: " + describe(weights, module));
      }
      expect_whole(weights, module, "but says so");
      if (reading.version < module.version)
        violate("a version fell to " + std::to_string(reading.version) + ": " +
                describe(weights, module));
      return;
    case ModuleState::poisoned:
      ++counts["poisoned"];
      for (auto& [id, commit] : module.commits) commit.link = 0;
      if (was == ModuleState::writing && module.touched)
        violate("poisoned without a fault: " + describe(weights, module));
      return;
  }
  violate("a word that is no state: " + std::to_string(now));
}

void Model::on_commit(Weights& weights, Weights::Module& module, const ModuleReading& reading) {
  ++counts["commits"];
  const auto found = transactions_.find(reading.transaction);
  const Target* target =
      found == transactions_.end() ? nullptr : target_of(found->second, weights, module);
  if (target == nullptr)
    return violate("a transaction that nobody sent was committed: " + describe(weights, module));
  const Transaction& transaction = found->second;
  for (std::size_t i = 0; i < module.good.size(); ++i) {
    if (target->selects(module.shape->target[i].name)) module.good[i] = transaction.tag;
  }
  module.version = std::max(module.version, reading.version);
  expect_whole(weights, module, "when committed");
  for (const Target& other : transaction.targets) {
    Weights* const engine = bound_to(other, transaction);
    if (engine == nullptr) continue;
    const Weights::Module& peer = engine->modules[other.module];
    for (std::size_t i = 0; i < peer.good.size(); ++i) {
      if (!other.selects(peer.shape->target[i].name)) continue;
      for (const Tag tag : peer.seen[i]) {
        if (tag != transaction.tag)
          return violate("one target was committed before the last byte of another: " +
                         describe(*engine, peer));
      }
    }
  }
  auto& commit = module.commits[reading.transaction];
  constexpr std::size_t kRemembered = 16;
  if (transaction.targets.size() == 1 && commit.link == weights.link->id &&
      module.commit_count - commit.index < kRemembered)
    violate("a committed transaction was written again: " + describe(weights, module));
  commit = {reading.version, weights.link->id, module.commit_count++};
}

void Model::on_bytes() {
  for (auto& [name, weights] : engines_) {
    if (weights->process->dying) continue;
    for (Weights::Module& module : weights->modules) {
      bool changed = false;
      for (std::size_t i = 0; i < module.good.size(); ++i) {
        auto tags = look(*module.shape, i, *module.memory);
        changed = changed || tags != module.seen[i];
        module.seen[i] = std::move(tags);
      }
      if (!changed) continue;
      if (weights->in_step) violate("bytes changed during a step: " + describe(*weights, module));
      if (module.block == nullptr)
        return violate("bytes changed that no word speaks of: " + describe(*weights, module));
      const ModuleReading reading = peek(*module.block);
      if (reading.word.state != ModuleState::writing)
        return violate("bytes changed while the word says otherwise: " +
                       describe(*weights, module));
      const auto found = transactions_.find(reading.transaction);
      if (found == transactions_.end()) return violate("an unknown transaction writes");
      Transaction& transaction = found->second;
      if (transaction.answered)
        violate("it writes on after its trainer was answered: " + describe(*weights, module));
      module.touched = true;
      transaction.touched = true;
      transaction.touched_at = kernel_.now();
      for (const Target& other : transaction.targets) {
        Weights* const engine = bound_to(other, transaction);
        if (engine == nullptr) continue;
        const Weights::Module& peer = engine->modules[other.module];
        if (peer.block == nullptr) continue;
        const ModuleReading peer_reading = peek(*peer.block);
        if (peer_reading.word.state != ModuleState::writing ||
            peer_reading.transaction != reading.transaction)
          violate("bytes changed before every word said `writing`: " + describe(*engine, peer));
      }
    }
  }
}

void Model::on_step_begin(Weights& weights) {
  ++counts["engine steps"];
  for (const Weights::Module& module : weights.modules) expect_whole(weights, module, "in a step");
  weights.in_step = true;
}

void Model::on_step_end(Weights& weights) { weights.in_step = false; }

void Model::on_posted(const TransactionId& id) {
  Transaction& transaction = transactions_.at(id);
  for (const Target& target : transaction.targets) {
    const auto engine = engines_.find(target.engine);
    if (engine == engines_.end()) continue;
    const Weights::Module& module = engine->second->modules[target.module];
    if (module.block == nullptr) continue;
    const ModuleReading reading = peek(*module.block);
    if (reading.word.state == ModuleState::writing && reading.transaction == id &&
        !engine->second->link->daemon->dying) {
      ++counts["sent again while it is written"];
      break;
    }
  }
  transaction.posted_at = kernel_.now();
  transaction.answered = false;
}

void Model::on_ok(const TransactionId& id, std::uint64_t version) {
  const Transaction& transaction = transactions_.at(id);
  std::uint64_t highest = 0;
  bool all_known = true;
  for (const Target& target : transaction.targets) {
    const Weights* const engine = bound_to(target, transaction);
    if (engine == nullptr) {
      all_known = false;
      continue;
    }
    const Weights::Module& module = engine->modules[target.module];
    const auto commit = module.commits.find(id);
    if (commit == module.commits.end())
      return violate("answered ok and never committed: " + id.to_string() + " in " +
                     describe(*engine, module));
    highest = std::max(highest, commit->second.version);
  }
  if (all_known && highest != version)
    violate("answered version " + std::to_string(version) + " for " + std::to_string(highest) +
            " of " + id.to_string());
}

void Model::on_refused(const TransactionId& id, Errc code) {
  ++counts["refused: " + std::string(errc_name(code))];
  const Transaction& transaction = transactions_.at(id);
  // What an earlier request of it did to engines that are gone since is not known any more.
  if (code == Errc::engine_gone || code == Errc::no_such_engine || code == Errc::no_such_module)
    return;
  if (transaction.touched && transaction.touched_at >= transaction.posted_at)
    violate("refused (" + std::string(errc_name(code)) + ") but it wrote: " + id.to_string());
}

}  // namespace refit::sim
