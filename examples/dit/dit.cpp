// The model's layers and their initial values. See dit.hpp.

#include "dit/dit.hpp"

#include <torch/nn/init.h>
#include <torch/nn/modules/activation.h>

#include <cmath>
#include <utility>

namespace dit {
namespace {

constexpr std::int64_t kFrequencies = 256;
constexpr double kMaxPeriod = 10'000.0;
constexpr double kEmbeddingStd = 0.02;
constexpr double kNearZero = 0.1;  // the scale of a near-zero layer's outputs, whatever the width

torch::nn::LayerNorm plain_norm(std::int64_t hidden) {
  return torch::nn::LayerNorm(
      torch::nn::LayerNormOptions({hidden}).elementwise_affine(false).eps(1e-6));
}

torch::nn::Sequential modulation(std::int64_t hidden, std::int64_t parts) {
  return torch::nn::Sequential(torch::nn::SiLU(), torch::nn::Linear(hidden, parts * hidden));
}

torch::Tensor modulate(const torch::Tensor& x, const torch::Tensor& shift,
                       const torch::Tensor& scale) {
  return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1);
}

// [n, kFrequencies]: cosines, then sines, of geometrically spaced frequencies.
torch::Tensor sinusoids(const torch::Tensor& positions, std::int64_t width) {
  const std::int64_t half = width / 2;
  const auto frequencies = torch::exp(torch::arange(half, torch::kFloat32) *
                                      (-std::log(kMaxPeriod) / static_cast<double>(half)));
  const auto angles = positions.to(torch::kFloat32).reshape({-1, 1}) * frequencies.unsqueeze(0);
  return torch::cat({torch::cos(angles), torch::sin(angles)}, 1);
}

// [1, tokens, hidden]: the fixed two-dimensional position code, half of it for the row and half for
// the column.
torch::Tensor position_code(const Config& config) {
  const std::int64_t grid = config.side / config.patch;
  const auto index = torch::arange(grid, torch::kFloat32);
  const auto rows = sinusoids(index.repeat_interleave(grid), config.hidden / 2);
  const auto columns = sinusoids(index.repeat({grid}), config.hidden / 2);
  return torch::cat({rows, columns}, 1).unsqueeze(0);
}

}  // namespace

AttentionImpl::AttentionImpl(const Config& config)
    : heads_(config.heads),
      qkv_(register_module("qkv", torch::nn::Linear(config.hidden, 3 * config.hidden))),
      proj_(register_module("proj", torch::nn::Linear(config.hidden, config.hidden))) {}

torch::Tensor AttentionImpl::forward(const torch::Tensor& x) {
  const std::int64_t batch = x.size(0), tokens = x.size(1), hidden = x.size(2),
                     width = hidden / heads_;
  // [3, batch, heads, tokens, width]
  const auto qkv = qkv_(x).reshape({batch, tokens, 3, heads_, width}).permute({2, 0, 3, 1, 4});
  const auto scores =
      torch::matmul(qkv[0], qkv[1].transpose(-2, -1)) / std::sqrt(static_cast<double>(width));
  const auto mixed = torch::matmul(torch::softmax(scores, -1), qkv[2]);
  return proj_(mixed.transpose(1, 2).reshape({batch, tokens, hidden}));
}

MlpImpl::MlpImpl(std::int64_t hidden)
    : fc1_(register_module("fc1", torch::nn::Linear(hidden, 4 * hidden))),
      fc2_(register_module("fc2", torch::nn::Linear(4 * hidden, hidden))) {}

torch::Tensor MlpImpl::forward(const torch::Tensor& x) {
  return fc2_(torch::gelu(fc1_(x), "tanh"));
}

BlockImpl::BlockImpl(const Config& config)
    : norm1_(register_module("norm1", plain_norm(config.hidden))),
      norm2_(register_module("norm2", plain_norm(config.hidden))),
      attn_(register_module("attn", Attention(config))),
      mlp_(register_module("mlp", Mlp(config.hidden))),
      modulation_(register_module("adaLN_modulation", modulation(config.hidden, 6))) {}

torch::Tensor BlockImpl::forward(const torch::Tensor& x, const torch::Tensor& conditioning) {
  const auto parts = modulation_->forward(conditioning).chunk(6, 1);
  const auto attended = x + parts[2].unsqueeze(1) * attn_(modulate(norm1_(x), parts[0], parts[1]));
  return attended + parts[5].unsqueeze(1) * mlp_(modulate(norm2_(attended), parts[3], parts[4]));
}

TimestepEmbedderImpl::TimestepEmbedderImpl(std::int64_t hidden)
    : mlp_(register_module(
          "mlp", torch::nn::Sequential(torch::nn::Linear(kFrequencies, hidden), torch::nn::SiLU(),
                                       torch::nn::Linear(hidden, hidden)))) {}

torch::Tensor TimestepEmbedderImpl::forward(const torch::Tensor& timesteps) {
  return mlp_->forward(sinusoids(timesteps, kFrequencies));
}

LabelEmbedderImpl::LabelEmbedderImpl(std::int64_t classes, std::int64_t hidden)
    : embedding_table_(
          register_module("embedding_table", torch::nn::Embedding(classes + 1, hidden))) {}

torch::Tensor LabelEmbedderImpl::forward(const torch::Tensor& labels) {
  return embedding_table_(labels);
}

PatchEmbedderImpl::PatchEmbedderImpl(const Config& config)
    : config_(config),
      proj_(register_module("proj", torch::nn::Linear(config.channels * config.patch * config.patch,
                                                      config.hidden))) {}

torch::Tensor PatchEmbedderImpl::forward(const torch::Tensor& latents) {
  // The paper's convolution with stride = kernel = patch, written as one linear map over cut-out
  // patches.
  const std::int64_t grid = config_.side / config_.patch, patch = config_.patch;
  const auto patches =
      latents.reshape({-1, config_.channels, grid, patch, grid, patch}).permute({0, 2, 4, 1, 3, 5});
  return proj_(patches.reshape({-1, grid * grid, config_.channels * patch * patch}));
}

FinalLayerImpl::FinalLayerImpl(const Config& config)
    : norm_final_(register_module("norm_final", plain_norm(config.hidden))),
      linear_(register_module(
          "linear",
          torch::nn::Linear(config.hidden, config.patch * config.patch * config.channels))),
      modulation_(register_module("adaLN_modulation", modulation(config.hidden, 2))) {}

torch::Tensor FinalLayerImpl::forward(const torch::Tensor& x, const torch::Tensor& conditioning) {
  const auto parts = modulation_->forward(conditioning).chunk(2, 1);
  return linear_(modulate(norm_final_(x), parts[0], parts[1]));
}

DiTImpl::DiTImpl(const Config& config)
    : config_(config),
      x_embedder_(register_module("x_embedder", PatchEmbedder(config))),
      t_embedder_(register_module("t_embedder", TimestepEmbedder(config.hidden))),
      y_embedder_(register_module("y_embedder", LabelEmbedder(config.classes, config.hidden))),
      pos_embed_(register_buffer("pos_embed", position_code(config))),
      blocks_(register_module("blocks", torch::nn::ModuleList())),
      final_layer_(register_module("final_layer", FinalLayer(config))) {
  for (std::int64_t i = 0; i < config.depth; ++i) blocks_->push_back(Block(config));
  initialize();
}

// As the paper, with one difference. adaLN-Zero sets the modulations and the last layer to exact
// zeros; at the first optimizer step their product then leaves every other tensor without a
// gradient, and an example that moves weights after each step would move mostly unchanged ones.
// Small random values keep each block near the identity, which is what the zeros are for, and let
// every tensor learn from step one.
void DiTImpl::initialize() {
  const torch::NoGradGuard no_grad;
  const double near_zero_std = kNearZero / std::sqrt(static_cast<double>(config_.hidden));
  for (const auto& item : named_parameters()) {
    const std::string& name = item.key();
    torch::Tensor value = item.value();
    if (value.dim() < 2) {
      value.zero_();
    } else if (name.find("adaLN_modulation") != std::string::npos ||
               name.rfind("final_layer", 0) == 0) {
      value.normal_(0, near_zero_std);
    } else if (name.rfind("t_embedder", 0) == 0 || name.rfind("y_embedder", 0) == 0) {
      value.normal_(0, kEmbeddingStd);
    } else {
      torch::nn::init::xavier_uniform_(value);
    }
  }
}

torch::Tensor DiTImpl::forward(const torch::Tensor& latents, const torch::Tensor& timesteps,
                               const torch::Tensor& labels) {
  const std::int64_t grid = config_.side / config_.patch, patch = config_.patch;
  const auto conditioning = t_embedder_(timesteps) + y_embedder_(labels);
  auto x = x_embedder_(latents) + pos_embed_;
  for (std::size_t i = 0; i < blocks_->size(); ++i) {
    if (hooks_ != nullptr) hooks_->before(i);
    x = blocks_->ptr(i)->as<Block>()->forward(x, conditioning);
    if (hooks_ != nullptr) hooks_->after(i);
  }
  const auto patches =
      final_layer_(x, conditioning).reshape({-1, grid, grid, config_.channels, patch, patch});
  return patches.permute({0, 3, 1, 4, 2, 5}).reshape(latents.sizes());
}

}  // namespace dit
