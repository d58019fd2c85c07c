// A trainer of the simulation: refits, gives up, sends again, dies. It keeps the contract that
// trainer.hpp states: its source bytes rest until the transaction was answered.
#include <algorithm>

#include "client.hpp"
#include "world.hpp"

namespace refit::sim {
namespace {

class Trainer {
 public:
  Trainer(World& world, std::string name, std::uint64_t life)
      : world_(world), kernel_(world.kernel), client_(world, Role::trainer, std::move(name)) {
    next_id_ = {life, 0};
    for (const Shape& shape : world_.shapes) memory_.push_back(Memory::of(shape));
  }

  void run() {
    std::uint64_t attempts = 4 + kernel_.chance.below(10);
    while (!kernel_.dying() && !world_.calm && attempts > 0) {
      --attempts;
      if (!ready(kernel_.now() + kernel_.chance.us(500, 6000))) {
        kernel_.sleep(kernel_.chance.us(20, 500));
        continue;
      }
      if (!pending_) choose();
      try_refit(patience(), kernel_.chance.one_in(4));
      if (kernel_.chance.one_in(3)) kernel_.sleep(kernel_.chance.us(1, 800));
    }
    if (kernel_.dying()) return;
    if (!world_.calm) --world_.trainers_in_storm;
    kernel_.wait([this] { return world_.calm; });
    if (kernel_.dying()) return;
    prove();
    if (!kernel_.dying()) --world_.trainers_at_work;
  }

 private:
  bool ready(Time deadline) {
    if (client_.connected() && client_.link->hung_up()) {
      client_.disconnect();
      registered_ = 0;
    }
    if (!client_.connected() && !client_.connect(kernel_.chance.us(100, 1000))) return false;
    while (registered_ < world_.shapes.size()) {
      const Shape& shape = world_.shapes[registered_];
      if (!client_.register_module(shape, shape.source, *memory_[registered_], {}, deadline))
        return false;
      ++registered_;
    }
    return !kernel_.dying();
  }

  microseconds patience() {
    switch (kernel_.chance.below(4)) {
      case 0:
        return kernel_.chance.us(10, 300);
      case 1:
        return kernel_.chance.us(400, 3000);
      default:
        return kernel_.chance.us(3000, 30'000);
    }
  }

  /// A new transaction: other bytes, some targets, some of their tensors.
  void choose() {
    std::vector<Target> targets;
    const std::uint64_t count = kernel_.chance.one_in(3) ? 2 : 1;
    for (std::uint64_t i = 0; i < count; ++i) {
      Target target{world_.engines[kernel_.chance.below(world_.engines.size())],
                    kernel_.chance.below(world_.shapes.size()),
                    {}};
      const bool twice = std::any_of(targets.begin(), targets.end(), [&](const Target& other) {
        return other.engine == target.engine && other.module == target.module;
      });
      if (twice) continue;
      if (kernel_.chance.one_in(3)) {
        for (const char* name : {"a", "b", "c"}) {
          if (kernel_.chance.one_in(2)) target.selection.emplace_back(name);
        }
      }
      targets.push_back(std::move(target));
    }
    begin(std::move(targets));
  }

  void begin(std::vector<Target> targets) {
    ++next_id_.low;
    const Tag tag = world_.next_tag++;
    for (std::size_t i = 0; i < memory_.size(); ++i) {
      if (!kernel_.dying()) std::fill_n(memory_[i]->cells(), world_.shapes[i].cells, tag);
    }
    targets_ = targets;
    pending_ = true;
    if (!kernel_.dying()) world_.model.begin_transaction(next_id_, tag, std::move(targets));
  }

  /// Sends what is pending, for the first time or again. The answer's code.
  Errc try_refit(microseconds patience, bool daemon_waits_longer) {
    const Time deadline = kernel_.now() + patience;
    auto& fbb = client_.builder;
    fbb.Clear();
    std::vector<flatbuffers::Offset<wire::Target>> list;
    for (const Target& target : targets_) {
      const auto engine = fbb.CreateString(target.engine);
      const auto module = fbb.CreateString(world_.shapes[target.module].name);
      flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>> selection;
      if (!target.selection.empty()) selection = fbb.CreateVectorOfStrings(target.selection);
      list.push_back(wire::CreateTarget(fbb, engine, module, module, selection, false));
    }
    const auto target_list = fbb.CreateVector(list);
    const auto id = to_wire(next_id_);
    const auto budget = static_cast<std::uint64_t>(patience.count());
    fbb.Finish(wire::CreateRefit(fbb, &id, target_list, wire::Staging::direct,
                                 kernel_.chance.one_in(4),
                                 daemon_waits_longer ? budget * 3 : budget - budget / 10));
    if (!kernel_.dying()) world_.model.on_posted(next_id_);
    const std::uint64_t request = client_.post(wire::Opcode::refit);
    if (request == 0) return Errc::busy;
    const Client::Answer answer = client_.await(request, deadline);
    if (kernel_.dying()) return Errc::daemon_gone;
    kernel_.note(errc_name(answer.code));
    if (!answer.replied) {
      ++world_.model.counts["calls that ended with " + std::string(errc_name(answer.code))];
      return answer.code;
    }
    pending_ = false;
    world_.model.on_answered(next_id_);
    if (answer.code == Errc::ok) {
      const auto* body = answer.reply->body_as_Refitted();
      ++world_.model.counts[body->replayed() ? "answered from the record" : "answered ok"];
      world_.model.on_ok(next_id_, body->version());
    } else {
      world_.model.on_refused(next_id_, answer.code);
    }
    return answer.code;
  }

  /// In the calm every engine takes a refit, and soon.
  void prove() {
    constexpr int kTries = 200;
    std::size_t engine = 0;
    for (int tries = 0; engine < world_.engines.size() && !kernel_.dying(); ++tries) {
      if (tries == kTries) return kernel_.violate(client_.name + " is refused for ever");
      if (!ready(kernel_.now() + seconds(5))) {
        kernel_.sleep(microseconds(500));
        continue;
      }
      const bool old = pending_;
      if (!pending_) {
        std::vector<Target> targets;
        for (std::size_t i = 0; i < world_.shapes.size(); ++i)
          targets.push_back({world_.engines[engine], i, {}});
        begin(std::move(targets));
      }
      const Time before = kernel_.now();
      const Errc code = try_refit(seconds(60), false);
      if (kernel_.dying()) return;
      if (kernel_.now() - before > seconds(2))
        return kernel_.violate(client_.name + " waited " +
                               std::to_string((kernel_.now() - before) / milliseconds(1)) +
                               " ms in the calm (" + std::string(errc_name(code)) + ")");
      if (old) continue;
      if (code == Errc::ok) {
        ++engine;
      } else {
        kernel_.sleep(microseconds(500));
      }
    }
  }

  World& world_;
  Kernel& kernel_;
  Client client_;
  std::vector<std::shared_ptr<Memory>> memory_;
  std::size_t registered_ = 0;
  TransactionId next_id_;
  std::vector<Target> targets_;
  bool pending_ = false;  ///< sent, and nobody knows what became of it
};

}  // namespace

void trainer_main(World& world, const std::string& name, std::uint64_t life) {
  Trainer(world, name, life).run();
}

}  // namespace refit::sim
