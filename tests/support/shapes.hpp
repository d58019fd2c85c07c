// Tensor lists beside small_tensors() that fault tests need in the test and in its peer processes.
//
// Data only.
#pragma once

#include <vector>

#include "support/model.hpp"

namespace refit::test {

/// Tensors whose sizes leave gaps between them, so that a copy of them is several operations and
/// half of it is a real mix.
inline std::vector<TensorShape> gapped_tensors() {
  return {{"a", DType::float32, {33}},
          {"b", DType::float32, {65}},
          {"c", DType::float32, {17, 3}},
          {"d", DType::float32, {129}}};
}

/// Enough bytes for the copy pool instead of the loop thread.
inline std::vector<TensorShape> large_tensors() {
  return {{"a", DType::float32, {1031, 1021}},
          {"b", DType::float32, {2053, 1021}},
          {"c", DType::float32, {3001}}};
}

}  // namespace refit::test
