#include "torch_cast.hpp"

#include <torch/torch.h>

namespace refit::bench {
namespace {

torch::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return torch::kBFloat16;
    case DType::float16:
      return torch::kFloat16;
    default:
      return torch::kFloat32;
  }
}

}  // namespace

struct TorchCast::Tensors {
  torch::Tensor source;
  torch::Tensor target;
};

TorchCast::TorchCast(DType from, DType to, std::int64_t elements)
    : tensors_(new Tensors{torch::randn({elements}).to(scalar_type(from)),
                           torch::zeros({elements}, scalar_type(to))}) {}

TorchCast::~TorchCast() = default;

void TorchCast::use_threads(int threads) { at::set_num_threads(threads); }

void TorchCast::run() { tensors_->target.copy_(tensors_->source); }

const std::byte* TorchCast::source() const {
  return static_cast<const std::byte*>(tensors_->source.data_ptr());
}

const std::byte* TorchCast::target() const {
  return static_cast<const std::byte*>(tensors_->target.data_ptr());
}

}  // namespace refit::bench
