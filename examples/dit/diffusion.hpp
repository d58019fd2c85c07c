// What makes a DiT a generator: the noise schedule, the data it learns, the loss, DDIM sampling, a
// fixed probe.
//
// Everything that is random comes from generators with given seeds, so that two processes can
// repeat it. One thread at a time per object. Knows nothing of refits.
#pragma once

#include <ATen/core/Generator.h>

#include <cstdint>
#include <vector>

#include "dit/dit.hpp"

namespace dit {

constexpr std::int64_t kTimesteps = 1'000;

/// A generator of its own, independent of torch's global one.
at::Generator generator(std::uint64_t seed);

/// Latents whose class decides their picture: a few waves per channel, plus a little noise.
struct Batch {
  torch::Tensor latents;    ///< [n, channels, side, side]
  torch::Tensor labels;     ///< [n]
  torch::Tensor timesteps;  ///< [n]
  torch::Tensor noise;      ///< like latents: what the model is to find
};

/// The linear DDPM schedule of the paper: betas from 1e-4 to 0.02 over 1,000 steps.
class Diffusion {
 public:
  explicit Diffusion(const Config& config);

  /// A training batch: random classes, timesteps and noise; a tenth of the labels becomes "no
  /// class".
  Batch draw(std::int64_t count, at::Generator& random) const;
  /// A batch for measuring: classes in turn, timesteps spread evenly over the schedule.
  Batch draw_evaluation(std::int64_t count, at::Generator& random) const;
  /// Mean squared error of the noise that `model` finds in the noised batch.
  torch::Tensor loss(DiT& model, const Batch& batch) const;

  /// sqrt(alpha_bar) and sqrt(1 - alpha_bar) of a timestep: how much signal and how much noise is
  /// left there.
  [[nodiscard]] double signal(std::int64_t timestep) const;
  [[nodiscard]] double noise(std::int64_t timestep) const;

 private:
  torch::Tensor latents_of(const torch::Tensor& labels, at::Generator& random) const;

  Config config_;
  torch::Tensor patterns_;   ///< [classes, channels, side, side]
  torch::Tensor alpha_bar_;  ///< [kTimesteps], float64
};

/// Draws latents with DDIM (eta 0), one denoising step per call, and begins anew after the last: an
/// engine's loop.
class Sampler {
 public:
  Sampler(const Diffusion& diffusion, const Config& config, std::int64_t batch, std::int64_t steps,
          std::uint64_t seed);
  /// One denoising step of `model`. Returns true if it finished a batch.
  bool step(DiT& model);
  [[nodiscard]] std::int64_t steps_taken() const noexcept { return steps_taken_; }
  [[nodiscard]] std::int64_t batches_finished() const noexcept { return batches_finished_; }

 private:
  void begin();

  const Diffusion& diffusion_;
  Config config_;
  std::int64_t batch_, steps_;
  at::Generator random_;
  torch::Tensor latents_, labels_;
  std::int64_t index_ = 0, steps_taken_ = 0, batches_finished_ = 0;
};

/// The model's output on an input that depends on the configuration alone, computed on one thread
/// without gradients: equal bits in two processes mean equal weights and equal arithmetic.
std::vector<float> probe(DiT& model);

}  // namespace dit
