// A diffusion transformer (DiT, Peebles & Xie 2022) in libtorch, small enough to step on a CPU.
//
// Plain torch modules under the names that the authors' Python gives them
// ("blocks.0.attn.qkv.weight"). One thread at a time per model. Knows nothing of refits:
// dit_trainer and dit_engine move its tensors into shared memory.
#pragma once

#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <cstddef>
#include <cstdint>

#include "dit/models.hpp"

namespace dit {

class AttentionImpl : public torch::nn::Module {
 public:
  explicit AttentionImpl(const Config& config);
  torch::Tensor forward(const torch::Tensor& x);

 private:
  std::int64_t heads_;
  torch::nn::Linear qkv_, proj_;
};
TORCH_MODULE(Attention);

class MlpImpl : public torch::nn::Module {
 public:
  explicit MlpImpl(std::int64_t hidden);
  torch::Tensor forward(const torch::Tensor& x);

 private:
  torch::nn::Linear fc1_, fc2_;
};
TORCH_MODULE(Mlp);

/// A transformer block whose norms are shifted, scaled and gated by the conditioning (adaLN).
class BlockImpl : public torch::nn::Module {
 public:
  explicit BlockImpl(const Config& config);
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& conditioning);

 private:
  torch::nn::LayerNorm norm1_, norm2_;
  Attention attn_;
  Mlp mlp_;
  torch::nn::Sequential modulation_;
};
TORCH_MODULE(Block);

class TimestepEmbedderImpl : public torch::nn::Module {
 public:
  explicit TimestepEmbedderImpl(std::int64_t hidden);
  torch::Tensor forward(const torch::Tensor& timesteps);

 private:
  torch::nn::Sequential mlp_;
};
TORCH_MODULE(TimestepEmbedder);

class LabelEmbedderImpl : public torch::nn::Module {
 public:
  LabelEmbedderImpl(std::int64_t classes, std::int64_t hidden);
  torch::Tensor forward(const torch::Tensor& labels);

 private:
  torch::nn::Embedding
      embedding_table_;  ///< one row more than classes: "no class", for classifier-free guidance
};
TORCH_MODULE(LabelEmbedder);

class PatchEmbedderImpl : public torch::nn::Module {
 public:
  explicit PatchEmbedderImpl(const Config& config);
  torch::Tensor forward(const torch::Tensor& latents);

 private:
  Config config_;
  torch::nn::Linear proj_;
};
TORCH_MODULE(PatchEmbedder);

class FinalLayerImpl : public torch::nn::Module {
 public:
  explicit FinalLayerImpl(const Config& config);
  torch::Tensor forward(const torch::Tensor& x, const torch::Tensor& conditioning);

 private:
  torch::nn::LayerNorm norm_final_;
  torch::nn::Linear linear_;
  torch::nn::Sequential modulation_;
};
TORCH_MODULE(FinalLayer);

/// Told around each block of a forward pass, on its thread: offload brings the block's weights and
/// takes them away.
class BlockHooks {
 public:
  virtual ~BlockHooks() = default;
  virtual void before(std::size_t block) = 0;
  virtual void after(std::size_t block) = 0;
};

/// Predicts the noise in a latent. Unlike the paper's it does not learn the variance: its output
/// has the latent's shape.
class DiTImpl : public torch::nn::Module {
 public:
  explicit DiTImpl(const Config& config);

  /// @param latents    [n, channels, side, side]
  /// @param timesteps  [n], 0..999
  /// @param labels     [n], 0..classes; `classes` itself means no class
  torch::Tensor forward(const torch::Tensor& latents, const torch::Tensor& timesteps,
                        const torch::Tensor& labels);

  /// Null: none. They must live as long as forward() is called.
  void set_block_hooks(BlockHooks* hooks) noexcept { hooks_ = hooks; }
  [[nodiscard]] const Config& config() const noexcept { return config_; }

 private:
  void initialize();

  Config config_;
  PatchEmbedder x_embedder_;
  TimestepEmbedder t_embedder_;
  LabelEmbedder y_embedder_;
  torch::Tensor pos_embed_;
  torch::nn::ModuleList blocks_;
  FinalLayer final_layer_;
  BlockHooks* hooks_ = nullptr;
};
TORCH_MODULE(DiT);

}  // namespace dit
