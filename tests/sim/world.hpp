// One run: a daemon, engines and trainers that come, go, sleep and die as the seed says, and then a
// calm in which everything must come to rest.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernel.hpp"
#include "model.hpp"

namespace refit::sim {

class Daemon;

struct Options {
  std::uint64_t seed = 1;
  bool trace = false;
  std::string bug;  ///< the name of a planted bug, or none
};

struct Outcome {
  std::string violation;   ///< empty: everything held
  std::uint64_t hash = 0;  ///< of every choice and event of the run
  std::uint64_t turns = 0;
  Counts counts;
};

Outcome simulate(const Options& options);

class World {
 public:
  explicit World(const Options& options);
  ~World();
  void run();

  Kernel kernel;
  Model model;
  std::vector<Shape> shapes;
  std::vector<std::string> engines;
  Waiting waiting = Waiting::adaptive;
  std::unique_ptr<Daemon> daemon;  ///< null while none runs
  std::shared_ptr<Process> daemon_process;
  bool calm = false;  ///< no deaths, no delays: what is asked now must succeed

  Tag next_tag = 0x1000;
  std::uint64_t next_life = 1;
  std::size_t trainers_in_storm = 0;  ///< that still have something to try before the calm
  std::size_t trainers_at_work = 0;

 private:
  enum class Role { daemon, engine, trainer };
  struct Actor {
    Role role;
    std::string name;
    std::shared_ptr<Process> process;
    unsigned lives_left = 0;  ///< deaths that it may still die
    Time starts{};
  };
  void make_shapes();
  void start(Actor& actor);
  Time between_turns();
  void harm(Actor& actor);

  std::vector<Actor> actors_;
  std::uint64_t next_link_ = 1;
  std::uint64_t freezes_left_ = 0;
  std::uint64_t harm_in_ = 0;  ///< turns of the scheduler until a death in `writing`; 0: none
  Time storm_ends_{};
};

/// The body of an engine's process: connects, registers, polls, steps, leaves, comes back.
void engine_main(World& world, const std::string& name);
/// The body of a trainer's process: refits, then proves in the calm that every engine takes one.
void trainer_main(World& world, const std::string& name, std::uint64_t life);

}  // namespace refit::sim
