#include "torch_cast.hpp"

// Not torch/torch.h, which takes several times as long to read.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

namespace refit::bench {
namespace {

at::ScalarType scalar_type(DType dtype) {
  switch (dtype) {
    case DType::bfloat16:
      return at::kBFloat16;
    case DType::float16:
      return at::kHalf;
    default:
      return at::kFloat;
  }
}

}  // namespace

struct TorchCast::Tensors {
  at::Tensor source;
  at::Tensor target;
};

TorchCast::TorchCast(DType from, DType to, std::int64_t elements)
    : tensors_(new Tensors{at::randn({elements}).to(scalar_type(from)),
                           at::zeros({elements}, scalar_type(to))}) {}

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
