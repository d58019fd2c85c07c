// Schedule, data, loss, sampler and probe. See diffusion.hpp.

#include "dit/diffusion.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>

namespace dit {
namespace {

constexpr double kBetaFirst = 1e-4;
constexpr double kBetaLast = 0.02;
constexpr double kDataNoise = 0.1;
constexpr double kLabelDrop = 0.1;
constexpr double kPi = 3.14159265358979323846;
constexpr std::uint64_t kPatternSeed = 20'22;
constexpr std::uint64_t kProbeSeed = 99;

// One plane wave for each class and channel, scaled to unit variance.
torch::Tensor make_patterns(const Config& config) {
  at::Generator random = generator(kPatternSeed);
  const auto options = torch::TensorOptions(torch::kFloat32);
  const std::vector<std::int64_t> each = {config.classes, config.channels, 1, 1};
  const auto across = torch::randint(0, 3, each, random, options);
  const auto down = torch::randint(0, 3, each, random, options);
  const auto phase = torch::rand(each, random, options) * (2 * kPi);
  const auto position =
      torch::arange(config.side, options) * (2 * kPi / static_cast<double>(config.side));
  const auto angle =
      across * position.reshape({1, 1, 1, -1}) + down * position.reshape({1, 1, -1, 1}) + phase;
  return torch::cos(angle) * std::sqrt(2.0);
}

/// Restores the caller's thread count.
class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(before_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

}  // namespace

at::Generator generator(std::uint64_t seed) {
  return at::make_generator<at::CPUGeneratorImpl>(seed);
}

Diffusion::Diffusion(const Config& config)
    : config_(config),
      patterns_(make_patterns(config)),
      alpha_bar_(torch::cumprod(
          1 - torch::linspace(kBetaFirst, kBetaLast, kTimesteps, torch::kFloat64), 0)) {}

double Diffusion::signal(std::int64_t timestep) const {
  return std::sqrt(alpha_bar_[timestep].item<double>());
}
double Diffusion::noise(std::int64_t timestep) const {
  return std::sqrt(1 - alpha_bar_[timestep].item<double>());
}

torch::Tensor Diffusion::latents_of(const torch::Tensor& labels, at::Generator& random) const {
  const auto clean = patterns_.index_select(0, labels);
  return clean + kDataNoise * torch::randn(clean.sizes(), random, clean.options());
}

Batch Diffusion::draw(std::int64_t count, at::Generator& random) const {
  const auto integers = torch::TensorOptions(torch::kInt64);
  Batch batch;
  const auto labels = torch::randint(0, config_.classes, {count}, random, integers);
  batch.latents = latents_of(labels, random);
  const auto dropped =
      torch::rand({count}, random, torch::TensorOptions(torch::kFloat32)) < kLabelDrop;
  batch.labels = labels.masked_fill(dropped, config_.classes);
  batch.timesteps = torch::randint(0, kTimesteps, {count}, random, integers);
  batch.noise = torch::randn(batch.latents.sizes(), random, batch.latents.options());
  return batch;
}

Batch Diffusion::draw_evaluation(std::int64_t count, at::Generator& random) const {
  Batch batch;
  batch.labels = torch::arange(count, torch::kInt64).remainder(config_.classes);
  batch.latents = latents_of(batch.labels, random);
  batch.timesteps = (torch::arange(count, torch::kFloat64) + 0.5)
                        .mul(static_cast<double>(kTimesteps) / static_cast<double>(count))
                        .to(torch::kInt64);
  batch.noise = torch::randn(batch.latents.sizes(), random, batch.latents.options());
  return batch;
}

torch::Tensor Diffusion::loss(DiT& model, const Batch& batch) const {
  const auto alpha_bar = alpha_bar_.index_select(0, batch.timesteps).reshape({-1, 1, 1, 1});
  const auto noised = alpha_bar.sqrt().to(torch::kFloat32) * batch.latents +
                      (1 - alpha_bar).sqrt().to(torch::kFloat32) * batch.noise;
  return (model(noised, batch.timesteps, batch.labels) - batch.noise).square().mean();
}

Sampler::Sampler(const Diffusion& diffusion, const Config& config, std::int64_t batch,
                 std::int64_t steps, std::uint64_t seed)
    : diffusion_(diffusion),
      config_(config),
      batch_(batch),
      steps_(steps),
      random_(generator(seed)) {
  begin();
}

void Sampler::begin() {
  latents_ = torch::randn({batch_, config_.channels, config_.side, config_.side}, random_,
                          torch::TensorOptions(torch::kFloat32));
  labels_ =
      torch::randint(0, config_.classes, {batch_}, random_, torch::TensorOptions(torch::kInt64));
  index_ = 0;
}

bool Sampler::step(DiT& model) {
  const torch::NoGradGuard no_grad;
  const auto timestep_at = [&](std::int64_t index) {
    return (kTimesteps - 1) * (steps_ - index) / steps_;
  };
  const std::int64_t now = timestep_at(index_), next = timestep_at(index_ + 1);
  const auto noise = model(latents_, torch::full({batch_}, now, torch::kInt64), labels_);
  // Clamped as usual: at the first timesteps the division would blow up what an untrained model
  // gets wrong.
  const auto clean =
      ((latents_ - diffusion_.noise(now) * noise) / diffusion_.signal(now)).clamp(-3, 3);
  latents_ = diffusion_.signal(next) * clean + diffusion_.noise(next) * noise;
  ++steps_taken_;
  if (++index_ < steps_) return false;
  ++batches_finished_;
  begin();
  return true;
}

std::vector<float> probe(DiT& model) {
  const torch::NoGradGuard no_grad;
  const OneThread one_thread;
  const Config& config = model->config();
  at::Generator random = generator(kProbeSeed);
  const auto latents = torch::randn({2, config.channels, config.side, config.side}, random,
                                    torch::TensorOptions(torch::kFloat32));
  const auto timesteps = torch::tensor({40, 700}, torch::kInt64);
  const auto labels =
      torch::tensor({std::int64_t{1} % config.classes, config.classes}, torch::kInt64);
  const bool training = model->is_training();
  model->eval();
  const auto output = model(latents, timesteps, labels).contiguous();
  model->train(training);
  std::vector<float> values(static_cast<std::size_t>(output.numel()));
  std::memcpy(values.data(), output.data_ptr(), values.size() * sizeof(float));
  return values;
}

}  // namespace dit
