// A trainer: takes optimizer steps on a DiT whose weights live in shared memory, and moves them
// into an engine.
//
// One thread, beside torch's own. It waits for commands, so that a person or the
// demo decides what happens when. It knows nothing of how the engine samples.

#include <ATen/Parallel.h>
#include <torch/optim/adamw.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstring>
#include <memory>
#include <refit/torch.hpp>
#include <refit/trainer.hpp>
#include <string>
#include <utility>
#include <vector>

#include "dit/diffusion.hpp"
#include "dit/memcpy_clock.hpp"
#include "dit/program.hpp"

namespace {

using dit::Commands;
using dit::Json;
using refit::Deadline;
using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto kAttachTime = 30s;
constexpr auto kRefitTime = 60s;
constexpr auto kDigestTime = 120s;

constexpr const char* kDescription =
    R"(A trainer of a diffusion transformer on the CPU: AdamW on a denoising loss.

Its parameters live in shared memory from the start, so a refit copies nothing here: refitd moves
the bytes from where the optimizer writes to where the engine computes. A refit that a daemon's end
meets goes on at the next daemon, for up to a minute.

Commands, one a line on stdin:
  step     take one optimizer step; says which share of the parameter tensors changed
  refit    move the weights into the engine
  memcpy   time one memcpy of as many bytes between shared pages, best of a few
  digest   ask the daemon for the SHA-256 of every tensor in the engine's live memory, of each place
           that it has
  forward  run the model on a fixed input and print the SHA-256 of the output's bytes
  quit     leave (so does the end of stdin)
Events, one JSON object a line on stdout: ready, step, refit, memcpy, digest, forward, refused,
error.)";

struct TrainingOptions {
  std::int64_t batch = 8;
  std::int64_t evaluation_batch = 16;
  double learning_rate = 0;
  int threads = 0;
};

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// The model, its optimizer and the data.
class Training {
 public:
  Training(dit::DiT model, const refit::ModuleSpec& spec,
           std::shared_ptr<refit::SharedMemory> before, const TrainingOptions& options,
           std::uint64_t seed)
      : model_(std::move(model)),
        spec_(spec),
        before_(std::move(before)),
        options_(options),
        diffusion_(model_->config()),
        random_(dit::generator(seed)),
        optimizer_(model_->parameters(),
                   torch::optim::AdamWOptions(options.learning_rate > 0
                                                  ? options.learning_rate
                                                  : dit::learning_rate_of(model_->config()))
                       .weight_decay(0)) {
    at::Generator fixed = dit::generator(0);
    evaluation_ = diffusion_.draw_evaluation(options.evaluation_batch, fixed);
    for (const auto& item : model_->named_parameters()) parameter_names_.push_back(item.key());
  }

  double evaluation_loss() {
    const torch::NoGradGuard no_grad;
    return diffusion_.loss(model_, evaluation_).item<double>();
  }

  Json step() {
    const refit::Memory& live = *spec_.regions().front();
    std::memcpy(before_->data(), live.data(), live.bytes());
    const auto start = Clock::now();
    optimizer_.zero_grad();
    auto loss = diffusion_.loss(model_, diffusion_.draw(options_.batch, random_));
    loss.backward();
    optimizer_.step();
    const double seconds = seconds_since(start);
    ++steps_;
    std::vector<std::string> unchanged = unchanged_parameters();
    return {{"event", "step"},
            {"step", steps_},
            {"loss", loss.item<double>()},
            {"evaluation_loss", evaluation_loss()},
            {"seconds", seconds},
            {"parameters", parameter_names_.size()},
            {"changed", parameter_names_.size() - unchanged.size()},
            {"unchanged", std::move(unchanged)}};
  }

 private:
  // Compares every byte with the copy from before the step; buffers are not learned and not
  // counted.
  [[nodiscard]] std::vector<std::string> unchanged_parameters() const {
    const refit::Memory& live = *spec_.regions().front();
    std::vector<std::string> unchanged;
    for (const refit::TensorSpec& tensor : spec_.tensors()) {
      if (std::find(parameter_names_.begin(), parameter_names_.end(), tensor.name) ==
          parameter_names_.end())
        continue;
      std::size_t bytes = refit::element_bytes(tensor.dtype);
      for (const std::uint64_t extent : tensor.shape) bytes *= extent;
      if (std::memcmp(live.data() + tensor.offset_bytes, before_->data() + tensor.offset_bytes,
                      bytes) == 0) {
        unchanged.push_back(tensor.name);
      }
    }
    return unchanged;
  }

  dit::DiT model_;
  const refit::ModuleSpec& spec_;
  std::shared_ptr<refit::SharedMemory> before_;
  TrainingOptions options_;
  dit::Diffusion diffusion_;
  at::Generator random_;
  torch::optim::AdamW optimizer_;
  dit::Batch evaluation_;
  std::vector<std::string> parameter_names_;
  std::int64_t steps_ = 0;
};

Json refit_event(const refit::RefitReport& report, double seconds) {
  const refit::Phases& phases = report.phases;
  return {{"event", "refit"},
          {"version", report.version},
          {"bytes", report.bytes},
          {"tensors", report.tensors},
          {"device_bytes", report.device_bytes},
          {"seconds", seconds},
          {"guarantee", refit::guarantee_name(report.guarantee)},
          {"transaction", report.transaction.to_string()},
          {"phases_us",
           {{"wait", phases.wait_us},
            {"gate", phases.gate_us},
            {"copy", phases.copy_us},
            {"check", phases.check_us},
            {"total", phases.total_us}}}};
}

Json digest_event(const refit::DigestReport& report) {
  Json tensors = Json::object();
  for (const auto& [name, digest] : report.tensors) tensors[name] = digest.to_hex();
  Json device = Json::object();
  for (const auto& [name, digest] : report.device) device[name] = digest.to_hex();
  return {{"event", "digest"},           {"state", refit::module_state_name(report.state)},
          {"version", report.version},   {"tensors", std::move(tensors)},
          {"device", std::move(device)}, {"absent", report.absent.size()}};
}

int train(const dit::CommonOptions& options, const TrainingOptions& sizes) {
  if (sizes.threads > 0) at::set_num_threads(sizes.threads);
  torch::manual_seed(options.seed);
  dit::DiT model(*dit::config_of(options.model));
  auto spec = refit::share_torch_module(*model, options.module);
  if (!spec) return dit::report(spec.error());
  const std::shared_ptr<refit::Memory> live = spec->regions().front();
  auto scratch = refit::SharedMemory::allocate(live->bytes(), "dit-scratch");
  if (!scratch) return dit::report(scratch.error());

  auto trainer =
      refit::Trainer::connect("dit_trainer", options.connection, Deadline::in(kAttachTime));
  if (!trainer) return dit::report(trainer.error());
  if (auto done = trainer->register_module(*spec, Deadline::in(kAttachTime)); !done)
    return dit::report(done.error());

  Training training(model, *spec, *scratch, sizes, options.seed + 1);
  Json ready = dit::ready_event(*spec);
  const auto bytes = ready["bytes"].get<std::size_t>();
  ready["evaluation_loss"] = training.evaluation_loss();
  ready["buffers"] = model->named_buffers().keys();
  dit::emit(ready);

  Commands commands;
  while (commands.wait(-1, -1) == Commands::Wake::command) {
    const std::string command = commands.take();
    if (command == "quit") return 0;
    if (command == "step") {
      dit::emit(training.step());
    } else if (command == "refit") {
      // Storage that libtorch replaced would be trained, and never refitted.
      if (auto lives = refit::check_torch_module(*model, *spec); !lives)
        return dit::report(lives.error());
      refit::RefitTarget target;
      target.engine = options.engine;
      target.module = options.module;
      const auto start = Clock::now();
      const auto report = trainer->refit(target, Deadline::in(kRefitTime));
      const double seconds = seconds_since(start);
      if (!report) return dit::report(report.error());
      dit::emit(refit_event(*report, seconds));
    } else if (command == "memcpy") {
      const dit::MemcpyTime best = dit::best_memcpy((*scratch)->data(), live->data(), bytes);
      dit::emit({{"event", "memcpy"},
                 {"seconds", best.seconds},
                 {"threads", best.threads},
                 {"bytes", bytes}});
    } else if (command == "digest") {
      refit::DigestRequest request;
      request.engine = options.engine;
      request.module = options.module;
      request.place = refit::Place::all;
      const auto report = trainer->digest(request, Deadline::in(kDigestTime));
      if (!report) return dit::report(report.error());
      dit::emit(digest_event(*report));
    } else if (command == "forward") {
      dit::emit(dit::forward_event(dit::probe(model)));
    } else {
      dit::emit(
          {{"event", "refused"}, {"command", command}, {"reason", "no such command; see --help"}});
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_IGN);
  dit::CommonOptions options;
  options.seed = 1;  // not the engine's: the engine must begin with other weights for a refit to
                     // mean something
  TrainingOptions sizes;
  CLI::App app(kDescription, "dit_trainer");
  dit::add_common_options(app, options);
  app.add_option("--batch", sizes.batch, "Latents in a training batch")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--evaluation-batch", sizes.evaluation_batch,
                 "Latents in the fixed batch that measures the loss")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--learning-rate", sizes.learning_rate, "Of AdamW (0: one that suits the model)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  app.add_option("--threads", sizes.threads, "Threads that compute (0: torch's choice)")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  try {
    return train(options, sizes);
  } catch (const std::exception& error) {
    return dit::report({refit::Errc::os, 0, std::string("libtorch: ") + error.what(), {}});
  }
}
