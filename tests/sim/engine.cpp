// An engine of the simulation: the product's Gate, and a loop around it that waits as Engine does.
#include <algorithm>
#include <map>

#include "client.hpp"
#include "ipc/waiting.hpp"
#include "world.hpp"

namespace refit::sim {
namespace {

class Engine {
 public:
  Engine(World& world, std::string name)
      : world_(world),
        kernel_(world.kernel),
        client_(world, Role::engine, std::move(name)),
        weights_(std::make_shared<Weights>()) {
    weights_->name = client_.name;
    weights_->process = kernel_.self();
    for (const Shape& shape : world_.shapes) {
      Weights::Module module;
      module.shape = &shape;
      module.memory = Memory::of(shape);
      const Tag own = world_.next_tag++;
      std::fill_n(module.memory->cells(), shape.cells, own);
      module.good.assign(shape.target.size(), own);
      weights_->modules.push_back(std::move(module));
    }
    world_.model.add_engine(weights_);
  }

  void run() {
    while (!kernel_.dying()) {
      if (!gate_.attached()) {
        if (kernel_.chance.one_in(2)) step();
        if (!attach()) {
          kernel_.sleep(kernel_.chance.us(20, 500));
          continue;
        }
      }
      if (world_.calm) {
        if (!all_registered()) register_all(kernel_.now() + seconds(5));
        if (kernel_.chance.one_in(2)) {
          wait(kernel_.now() + seconds(100));
        } else {
          poll(kernel_.now() + seconds(5));
        }
        step();
        sim::give_way();
        continue;
      }
      act();
    }
  }

 private:
  /// Anything that an engine may do between two of its steps.
  void act() {
    switch (kernel_.chance.below(24)) {
      case 0:
        return kernel_.sleep(kernel_.chance.us(20, 2000));
      case 1:
        return register_again();
      case 2:
        return leave();
      case 3:
        if (const std::uint64_t epoch = gate_.asked_epoch(); epoch != 0) {
          ++world_.model.counts["questions refused"];
          gate_.refuse(epoch);
        }
        return;
      case 4:
      case 5:
      case 6:
        return wait(kernel_.now() + kernel_.chance.us(20, 2000));
      case 7:
      case 8:
        if (!all_registered()) register_all(kernel_.now() + kernel_.chance.us(300, 4000));
        return;
      case 9:
      case 10:
      case 11:
      case 12:
      case 13:
        // Little patience: steps back about when the daemon begins to write.
        return poll(kernel_.now() + kernel_.chance.us(1, 40));
      default:
        poll(kernel_.now() + kernel_.chance.us(200, 20'000));
        step();
        sim::give_way();
        return;
    }
  }

  bool attach() {
    if (!client_.connect(kernel_.chance.us(100, 1000))) return false;
    gate_.attach(&client_.regions);
    world_.model.on_link(*weights_, client_.link);
    registered_.clear();
    cleared_epoch_ = 0;
    // As Engine::reconnect: with what it holds.
    register_all(kernel_.now() +
                 (world_.calm ? microseconds(seconds(5)) : kernel_.chance.us(300, 6000)));
    return true;
  }

  void register_all(Time deadline) {
    for (std::size_t i = 0; i < world_.shapes.size() && !kernel_.dying(); ++i) {
      if (!gate_.attached()) return;
      if (registered_.count(i) == 0 && !register_now(i, deadline)) return;
    }
  }
  [[nodiscard]] bool all_registered() const { return registered_.size() == world_.shapes.size(); }

  bool register_now(std::size_t index, Time deadline) {
    const Shape& shape = world_.shapes[index];
    HeldState held = gate_.held(shape.name);
    if (sim::planted("engine.forgets_poison")) held.poisoned = false;
    if (held.poisoned) ++world_.model.counts["registered as poisoned"];
    const auto slot = client_.register_module(shape, shape.target, *weights_->modules[index].memory,
                                              held, deadline);
    if (kernel_.dying()) return false;
    ModuleSpec spec(shape.name);
    for (const TensorSpec& tensor : shape.target) spec.add(tensor);
    if (!slot) {
      if (slot.error() != Errc::deadline && slot.error() != Errc::daemon_gone) return false;
      ++world_.model.counts["registrations in doubt"];
      if (!sim::planted("engine.forgets_doubt")) gate_.put_in_doubt(std::move(spec));
      return false;
    }
    ++world_.model.counts["registrations of engines"];
    gate_.put(std::move(spec), *slot);
    registered_[index] = true;
    return true;
  }

  /// As Engine::register_module.
  void register_again() {
    const std::size_t index = kernel_.chance.below(world_.shapes.size());
    if (gate_.holding() && !gate_.withdraw()) return;
    // Half of them are given up before the daemon reads them, and done all the same.
    register_now(index, kernel_.now() + (kernel_.chance.one_in(2) ? kernel_.chance.us(1, 30)
                                                                  : kernel_.chance.us(300, 4000)));
  }

  /// As Engine::reconnect, but for what follows.
  void leave() {
    if (!client_.link->daemon->dead() && !gate_.withdraw()) return;
    ++world_.model.counts["engines that left and came back"];
    let_go();
  }

  /// As Engine::Impl::daemon_gone.
  void let_go() {
    gate_.detach();
    client_.disconnect();
    if (!kernel_.dying()) world_.model.on_link(*weights_, nullptr);
  }

  /// As Engine::poll.
  void poll(Time deadline) {
    if (!gate_.attached()) return;
    if (take_event()) return;
    if (cleared_epoch_ != 0 && gate_.asked_epoch() == cleared_epoch_) return;
    if (!gate_.due() && !gate_.holding()) {
      if (client_.link->hung_up() && !gate_.due()) let_go();
      return;
    }
    hold(deadline);
  }

  /// As Engine::wait.
  void wait(Time deadline) {
    while (!kernel_.dying() && gate_.attached()) {
      if (take_event()) return;
      if (cleared_epoch_ != 0 && gate_.asked_epoch() == cleared_epoch_) {
        kernel_.sleep(microseconds(50));
        return;
      }
      if (gate_.due() || gate_.holding()) {
        if (hold(deadline) || kernel_.now() >= deadline) return;
        continue;
      }
      if (kernel_.now() >= deadline) return;
      const Link& link = *client_.link;
      kernel_.wait([&] { return link.client_bell.rung() || link.hung_up(); }, deadline);
      if (kernel_.dying()) return;
      link.client_bell.drain();
      if (link.hung_up() && !gate_.due() && !gate_.holding()) return let_go();
    }
  }

  /// As Engine::Impl::hold. True: an event came.
  bool hold(Time deadline) {
    const Link& link = *client_.link;
    bool may_spin = world_.waiting == Waiting::adaptive && !gate_.long_copy();
    bool socket_open = true;
    while (!kernel_.dying()) {
      gate_.pump();
      if (!gate_.holding()) return take_event();
      if (may_spin) {
        may_spin = false;
        const Awake reading(client_.regions.request_region());
        spin_briefly([&] { return gate_.due(); });
      }
      if (gate_.due()) continue;
      kernel_.wait(
          [&] {
            return link.client_bell.rung() || link.daemon->dead() ||
                   (socket_open && link.hung_up());
          },
          deadline);
      if (kernel_.dying()) return false;
      link.client_bell.drain();
      if (gate_.due()) continue;
      if (link.daemon->dead()) return after_death();
      if (socket_open && link.hung_up()) {
        socket_open = false;
        if (withdraw()) return after_death();
      }
      if (kernel_.now() >= deadline) {
        if (withdraw()) {
          ++world_.model.counts["withdrawals"];
          return take_event();
        }
        ++world_.model.counts["deadlines in writing"];
        if (sim::planted("engine.leaves_writing_by_its_own_clock")) left_ = true;
        return false;
      }
    }
    return false;
  }

  bool withdraw() {
    if (sim::planted("engine.withdraws_without_a_look") && gate_.holding()) {
      const auto epoch = GateWord::unpack(client_.regions.response_region().gate.load()).epoch;
      client_.regions.request_region().gate_answer.store(
          AnswerWord{epoch, AnswerState::withdrawn}.pack());
      left_ = true;
    }
    return gate_.withdraw();
  }

  /// As Engine::Impl::after_death.
  bool after_death() {
    ++world_.model.counts["gates that outlived their daemon"];
    gate_.leave();
    auto event = gate_.take_event();
    let_go();
    if (event && gate_.step_allowed()) return told(*event);
    return false;
  }

  bool take_event() {
    auto event = gate_.take_event();
    if (!event) return false;
    if (sim::planted("engine.clears_pending_after_committed")) cleared_epoch_ = gate_.asked_epoch();
    return told(*event);
  }

  bool told(const GateEvent& event) {
    ++world_.model.counts["gate events"];
    for (const GateEvent::Module& module : event.modules) {
      auto& last = told_[module.name];
      if (module.version < last && !kernel_.dying())
        kernel_.violate(client_.name + " was told version " + std::to_string(module.version) +
                        " of " + module.name + " after " + std::to_string(last));
      last = module.version;
    }
    return true;
  }

  void step() {
    if (!gate_.step_allowed() && !left_) {
      ++world_.model.counts["steps not allowed"];
      return;
    }
    left_ = false;
    if (kernel_.dying()) return;
    world_.model.on_step_begin(*weights_);
    for (std::size_t i = 0; i < weights_->modules.size(); ++i) {
      const auto& module = weights_->modules[i];
      if (gate_.version(module.shape->name) != module.version && gate_.attached() &&
          registered_.count(i) != 0 && !kernel_.dying())
        kernel_.violate(client_.name + " steps on version " + std::to_string(module.version) +
                        " of " + module.shape->name + " and calls it " +
                        std::to_string(gate_.version(module.shape->name)));
    }
    for (std::uint64_t i = kernel_.chance.below(12); i > 0; --i) sim::give_way();
    if (!kernel_.dying()) world_.model.on_step_end(*weights_);
  }

  World& world_;
  Kernel& kernel_;
  Client client_;
  Gate gate_;
  std::shared_ptr<Weights> weights_;
  std::map<std::size_t, bool> registered_;  ///< with this daemon
  std::map<std::string, std::uint64_t> told_;
  std::uint64_t cleared_epoch_ = 0;  ///< a planted bug's: a question that it threw away
  bool left_ = false;                ///< a planted bug's: it steps whatever the gate says
};

}  // namespace

void engine_main(World& world, const std::string& name) { Engine(world, name).run(); }

}  // namespace refit::sim
