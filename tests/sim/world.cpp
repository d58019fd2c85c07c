#include "world.hpp"

#include <algorithm>

#include "daemon.hpp"

namespace refit::sim {
namespace {

constexpr std::uint64_t kTurnsMax = 1'000'000;
constexpr microseconds kStormMax{12'000};

TensorSpec tensor(std::string name, Dims shape, Dims strides, std::uint64_t cell) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = DType::int64;
  spec.shape = std::move(shape);
  spec.strides = std::move(strides);
  spec.offset_bytes = cell * sizeof(Tag);
  return spec;
}

}  // namespace

World::World(const Options& options) : kernel(options.seed, options.trace), model(kernel) {
  kernel.bug = options.bug;
  waiting = kernel.chance.one_in(2) ? Waiting::adaptive : Waiting::off;
  make_shapes();
  const std::uint64_t engine_count = 1 + kernel.chance.below(2);
  const std::uint64_t trainer_count = 1 + kernel.chance.below(3);
  const auto lives = [this](std::uint64_t most) {
    return static_cast<unsigned>(kernel.chance.below(most + 1));
  };
  actors_.push_back({Role::daemon, "daemon", nullptr, lives(2), {}});
  for (std::uint64_t i = 0; i < engine_count; ++i) {
    engines.push_back("engine" + std::to_string(i));
    actors_.push_back({Role::engine, engines.back(), nullptr, lives(1), {}});
  }
  for (std::uint64_t i = 0; i < trainer_count; ++i)
    actors_.push_back({Role::trainer, "trainer" + std::to_string(i), nullptr, lives(1), {}});
  trainers_in_storm = trainers_at_work = trainer_count;
  freezes_left_ = kernel.chance.below(5);
  storm_ends_ = kernel.now() + kStormMax;
  kernel.on_turn = [this] { model.on_turn(); };
  kernel.between_turns = [this] { return between_turns(); };
  model.on_writing = [this] {
    if (!calm && harm_in_ == 0 && kernel.chance.one_in(6)) harm_in_ = 1 + kernel.chance.below(24);
  };
}

World::~World() {
  kernel.stop();
  daemon.reset();
}

void World::make_shapes() {
  const std::uint64_t count = 1 + kernel.chance.below(2);
  // Above the size that the loop copies itself, so that the copy pool has its turn too.
  const bool big = kernel.chance.one_in(4);
  for (std::uint64_t i = 0; i < count; ++i) {
    Shape shape;
    shape.name = "m" + std::to_string(i);
    const std::uint64_t rows = big && i == 0 ? 4352 : 4;
    shape.target = {tensor("a", {rows, 8}, {8, 1}, 0), tensor("b", {3, 2}, {1, 3}, rows * 8),
                    tensor("c", {5}, {1}, rows * 8 + 6)};
    shape.source = {tensor("a", {rows, 8}, {8, 1}, 0), tensor("b", {3, 2}, {2, 1}, rows * 8),
                    tensor("c", {5}, {1}, rows * 8 + 6)};
    shape.cells = rows * 8 + 11;
    shapes.push_back(std::move(shape));
  }
}

void World::start(Actor& actor) {
  actor.process = kernel.start(actor.name);
  const std::uint64_t life = next_life++;
  switch (actor.role) {
    case Role::daemon:
      daemon_process = actor.process;
      kernel.spawn(actor.process, [this] {
        daemon = std::make_unique<Daemon>(kernel, waiting, next_link_);
        daemon->run();
      });
      return;
    case Role::engine:
      kernel.spawn(actor.process, [this, name = actor.name] { engine_main(*this, name); });
      return;
    case Role::trainer:
      kernel.spawn(actor.process,
                   [this, name = actor.name, life] { trainer_main(*this, name, life); });
      return;
  }
}

Time World::between_turns() {
  Time next = kNever;
  if (!calm && (trainers_in_storm == 0 || kernel.now() >= storm_ends_)) {
    kernel.note("calm");
    calm = true;
    for (Actor& actor : actors_) {
      if (actor.process != nullptr) actor.process->frozen_until = {};
    }
  }
  for (Actor& actor : actors_) {
    if (actor.process == nullptr) {
      if (calm || kernel.now() >= actor.starts) {
        start(actor);
      } else {
        next = std::min(next, actor.starts);
      }
    } else if (actor.process->dying && !kernel.has_fibers(*actor.process)) {
      if (actor.role == Role::daemon) {
        if (daemon != nullptr) next_link_ = daemon->next_link();
        daemon.reset();
        // systemd would start the next one only once this one is gone.
        if (!actor.process->dead()) continue;
        daemon_process.reset();
      }
      actor.process.reset();
      actor.starts = kernel.now() + kernel.chance.us(0, 2000);
      next = std::min(next, actor.starts);
    }
  }
  if (calm) return next;
  next = std::min(next, storm_ends_);
  if (harm_in_ > 0) {
    if (--harm_in_ == 0)
      harm(actors_[kernel.chance.one_in(2) ? 0 : kernel.chance.below(actors_.size())]);
  } else if (kernel.chance.one_in(700)) {
    harm(actors_[kernel.chance.below(actors_.size())]);
  }
  return next;
}

void World::harm(Actor& actor) {
  if (actor.process == nullptr || actor.process->dying) return;
  if (actor.lives_left > 0 && kernel.chance.below(3) != 0) {
    --actor.lives_left;
    ++model.counts["deaths of " + std::string(actor.role == Role::daemon   ? "daemons"
                                              : actor.role == Role::engine ? "engines"
                                                                           : "trainers")];
    kernel.kill(actor.process);
  } else if (freezes_left_ > 0) {
    --freezes_left_;
    ++model.counts["freezes"];
    kernel.freeze(actor.process, kernel.chance.us(20, 4000));
  }
}

void World::run() {
  if (!kernel.run([this] { return calm && trainers_at_work == 0; }, kTurnsMax))
    throw Violation("nothing moves any more, and somebody still waits");
}

Outcome simulate(const Options& options) {
  Outcome outcome;
  World world(options);
  try {
    world.run();
  } catch (const Violation& violation) {
    outcome.violation = violation.what();
  }
  outcome.hash = world.kernel.hash();
  outcome.turns = world.kernel.turns();
  outcome.counts = world.model.counts;
  return outcome;
}

}  // namespace refit::sim
