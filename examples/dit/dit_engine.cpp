// An engine: a DiT that samples images for ever, and lets a trainer's weights in between two
// denoising steps.
//
// One thread, and offload's if it is asked for. Its gate is Engine::poll() while it samples and
// Engine::fd() beside stdin while it is paused. It knows nothing of who trains.

#include <ATen/Parallel.h>

#include <chrono>
#include <csignal>
#include <memory>
#include <refit/engine.hpp>
#include <refit/torch.hpp>
#include <string>

#include "dit/diffusion.hpp"
#include "dit/offload.hpp"
#include "dit/program.hpp"

namespace {

using dit::Commands;
using dit::Json;
using refit::Deadline;
using namespace std::chrono_literals;

constexpr auto kAttachTime = 30s;
constexpr auto kGateTime = 1s;
constexpr std::chrono::milliseconds kIdleTime = 1s;  // then poll() looks whether the daemon lives
constexpr std::chrono::milliseconds kBlockedTime = 10ms;

constexpr const char* kDescription =
    R"(An engine that samples from a diffusion transformer on the CPU.

It registers its parameters with refitd once. Between two denoising steps it asks its gate; a
trainer's refit comes in there, and the next step runs on the new weights. If the daemon ends, it
goes on sampling on whole weights and comes back to the next one.

Commands, one a line on stdin:
  run      sample without end
  pause    stop after the running step; refits are still let in
  forward  run the model on a fixed input and print the SHA-256 of the output's bytes
  status   print counters
  quit     leave (so does the end of stdin)
Events, one JSON object a line on stdout: ready, gate (new weights arrived), running, paused,
forward, status, refused, error.)";

struct EngineOptions {
  std::int64_t batch = 1;
  std::int64_t steps = 25;
  int threads = 1;
  std::size_t offload_blocks = 0;  ///< 0: everything is on the device
};

Json gate_event(const refit::GateEvent& event, const dit::Sampler& sampler) {
  Json modules = Json::array();
  for (const refit::GateEvent::Module& module : event.modules) {
    modules.push_back({{"module", module.name},
                       {"version", module.version},
                       {"transaction", module.transaction.to_string()}});
  }
  return {{"event", "gate"},
          {"modules", std::move(modules)},
          {"reset_caches", event.reset_caches},
          {"denoising_steps", sampler.steps_taken()}};
}

Json counters(const char* event, const refit::Engine& engine, const std::string& module,
              const dit::Sampler& sampler) {
  return {{"event", event},
          {"denoising_steps", sampler.steps_taken()},
          {"batches", sampler.batches_finished()},
          {"version", engine.version(module)},
          {"state", refit::module_state_name(engine.state(module))},
          {"step_allowed", engine.step_allowed()}};
}

int serve(const dit::CommonOptions& options, const EngineOptions& sizes) {
  at::set_num_threads(sizes.threads);
  torch::manual_seed(options.seed);
  const dit::Config config = *dit::config_of(options.model);
  dit::DiT model(config);
  model->eval();
  std::unique_ptr<dit::LayerwiseOffload> offload;
  if (sizes.offload_blocks > 0) {
    auto made = dit::LayerwiseOffload::create(model, options.module, sizes.offload_blocks);
    if (!made) return dit::report(made.error());
    offload = std::move(*made);
  }
  const auto spec = offload ? refit::Result<refit::ModuleSpec>(offload->spec())
                            : refit::share_torch_module(*model, options.module);
  if (!spec) return dit::report(spec.error());

  auto engine =
      refit::Engine::connect(options.engine, options.connection, Deadline::in(kAttachTime));
  if (!engine) return dit::report(engine.error());
  if (auto done = engine->register_module(*spec, Deadline::in(kAttachTime)); !done)
    return dit::report(done.error());

  const dit::Diffusion diffusion(config);
  dit::Sampler sampler(diffusion, config, sizes.batch, sizes.steps, options.seed);
  Commands commands;
  dit::emit(dit::ready_event(*spec));

  bool running = false;
  for (;;) {
    // A step may run only on whole weights. While none may, there is nothing to do but wait at the
    // gate.
    const auto idle_time = !running ? kIdleTime : engine->step_allowed() ? 0ms : kBlockedTime;
    switch (commands.wait(engine->fd(), static_cast<int>(idle_time.count()))) {
      case Commands::Wake::end:
        return 0;
      case Commands::Wake::command: {
        const std::string command = commands.take();
        if (command == "quit") return 0;
        if (command == "run") {
          running = true;
          dit::emit(counters("running", *engine, options.module, sampler));
        } else if (command == "pause") {
          running = false;
          dit::emit(counters("paused", *engine, options.module, sampler));
        } else if (command == "status") {
          dit::emit(counters("status", *engine, options.module, sampler));
        } else if (command == "forward" && engine->step_allowed()) {
          Json event = dit::forward_event(dit::probe(model));
          event["version"] = engine->version(options.module);
          dit::emit(event);
        } else {
          dit::emit({{"event", "refused"},
                     {"command", command},
                     {"reason", command == "forward" ? "the weights are not whole"
                                                     : "no such command; see --help"}});
        }
        continue;
      }
      case Commands::Wake::descriptor:
      case Commands::Wake::timeout:
        break;
    }
    auto gate = engine->poll(Deadline::in(kGateTime));
    // A deadline here means that bytes are being written right now: no step, ask again.
    if (!gate && gate.error().code != refit::Errc::deadline) return dit::report(gate.error());
    if (gate && gate->has_value()) dit::emit(gate_event(**gate, sampler));
    if (running && engine->step_allowed()) sampler.step(model);
  }
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  dit::CommonOptions options;
  EngineOptions sizes;
  CLI::App app(kDescription, "dit_engine");
  dit::add_common_options(app, options);
  app.add_option("--batch", sizes.batch, "Images sampled at a time")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--denoising-steps", sizes.steps, "DDIM steps an image takes")
      ->check(CLI::Range(1, 1000))
      ->capture_default_str();
  app.add_option("--threads", sizes.threads, "Threads that compute")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--offload", sizes.offload_blocks,
                 "Keep the blocks on the host and bring this many at a time to the device (0: all "
                 "are there)")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    return serve(options, sizes);
  } catch (const std::exception& error) {
    return dit::report({refit::Errc::os, 0, std::string("libtorch: ") + error.what(), {}});
  }
}
