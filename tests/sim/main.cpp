// refit_sim: runs seeds of the simulation from the command line.
//
//   refit_sim --seed 42 --trace          one run, told step by step
//   refit_sim --seeds 100000             a night's worth
//   refit_sim --bug NAME --seeds 1000    until the planted bug is found
#include <CLI/CLI.hpp>
#include <cinttypes>
#include <cstdio>

#include "world.hpp"

int main(int argc, char** argv) {
  refit::sim::Options options;
  std::uint64_t seeds = 1;
  CLI::App app("Simulates the daemon, its engines and its trainers from a seed.");
  app.add_option("--seed", options.seed, "the first seed")->capture_default_str();
  app.add_option("--seeds", seeds, "how many seeds to run")->capture_default_str();
  app.add_option("--bug", options.bug, "plants the bug of this name");
  app.add_flag("--trace", options.trace, "prints what happens");
  CLI11_PARSE(app, argc, argv);

  refit::sim::Counts counts;
  std::uint64_t turns = 0;
  std::uint64_t hash = 0;
  for (std::uint64_t i = 0; i < seeds; ++i, ++options.seed) {
    const refit::sim::Outcome outcome = refit::sim::simulate(options);
    counts.add(outcome.counts);
    turns += outcome.turns;
    hash = outcome.hash;
    if (outcome.violation.empty()) continue;
    std::printf("seed %" PRIu64 " (%" PRIu64 " runs): %s\nsee it happen: refit_sim --seed %" PRIu64
                " --trace%s%s\n",
                options.seed, i + 1, outcome.violation.c_str(), options.seed,
                options.bug.empty() ? "" : " --bug ", options.bug.c_str());
    return 1;
  }
  std::printf("%" PRIu64 " seeds, %" PRIu64 " turns, last hash %016" PRIx64 "\n", seeds, turns,
              hash);
  for (const auto& [what, count] : counts.of)
    std::printf("%12" PRIu64 "  %s\n", count, what.c_str());
  return 0;
}
