// A small model in shared memory: what a test trainer and a test engine hold.
#pragma once

#include <algorithm>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "refit/memory.hpp"
#include "refit/module.hpp"
#include "support/must.hpp"

namespace refit::test {

struct TensorShape {
  std::string name;
  DType dtype = DType::float32;
  Dims shape;
};

/// Tensors packed into one SharedMemory.
class Model {
 public:
  Model(const std::string& module, const std::vector<TensorShape>& tensors) : spec_(module) {
    std::vector<std::uint64_t> sizes;
    for (const TensorShape& tensor : tensors) sizes.push_back(bytes_of(tensor));
    const ArenaLayout layout = ArenaLayout::pack(sizes);
    memory_ =
        must(SharedMemory::allocate(layout.bytes == 0 ? 1 : layout.bytes, "refit-test-model"));
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      std::byte* data = memory_->data() + layout.offsets[i];
      must(spec_.add(tensors[i].name, tensors[i].dtype, tensors[i].shape, memory_, data));
      names_.push_back(tensors[i].name);
      data_.push_back(data);
      bytes_.push_back(sizes[i]);
    }
  }

  static std::uint64_t bytes_of(const TensorShape& tensor) {
    std::uint64_t bytes = element_bytes(tensor.dtype);
    for (const std::uint64_t extent : tensor.shape) bytes *= extent;
    return bytes;
  }

  /// Fills every tensor with bytes that depend on `seed`.
  void fill(std::uint64_t seed) {
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i < data_.size(); ++i) {
      for (std::uint64_t k = 0; k < bytes_[i]; k += 8) {
        const std::uint64_t value = random();
        std::memcpy(data_[i] + k, &value,
                    static_cast<std::size_t>(std::min<std::uint64_t>(8, bytes_[i] - k)));
      }
    }
  }

  [[nodiscard]] bool equals(const Model& other) const {
    for (std::size_t i = 0; i < data_.size(); ++i) {
      if (!tensor_equals(other, i)) return false;
    }
    return true;
  }
  [[nodiscard]] bool tensor_equals(const Model& other, std::size_t index) const {
    return bytes_[index] == other.bytes_[index] &&
           std::memcmp(data_[index], other.data_[index], bytes_[index]) == 0;
  }

  [[nodiscard]] ModuleSpec& spec() { return spec_; }
  [[nodiscard]] const std::vector<std::string>& names() const { return names_; }
  [[nodiscard]] std::byte* data(std::size_t index) const { return data_[index]; }
  [[nodiscard]] std::uint64_t bytes(std::size_t index) const { return bytes_[index]; }
  [[nodiscard]] const std::shared_ptr<SharedMemory>& memory() const { return memory_; }

 private:
  ModuleSpec spec_;
  std::shared_ptr<SharedMemory> memory_;
  std::vector<std::string> names_;
  std::vector<std::byte*> data_;
  std::vector<std::uint64_t> bytes_;
};

inline std::vector<TensorShape> small_tensors() {
  return {{"embed.weight", DType::bfloat16, {64, 32}},
          {"block.0.attn.weight", DType::float32, {48, 48}},
          {"block.0.attn.bias", DType::float32, {48}},
          {"block.1.mlp.weight", DType::float16, {16, 3, 2, 2}},
          {"scale", DType::float32, {}},
          {"counter", DType::int64, {}},
          {"empty", DType::bfloat16, {0, 4}}};
}

}  // namespace refit::test
