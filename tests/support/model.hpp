// A small model: what a test trainer and a test engine hold, in shared host memory unless a storage
// puts it elsewhere.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
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

/// Where a model's tensors are, and the CPU's view of them.
class ModelStorage {
 public:
  struct Place {
    std::shared_ptr<Memory> memory;
    std::byte* address = nullptr;  ///< what is registered
    std::byte* view = nullptr;     ///< the same where a CPU reaches the memory, else a copy of it
  };
  virtual ~ModelStorage() = default;
  /// Of the tensors, in their order.
  [[nodiscard]] virtual const std::vector<Place>& places() const = 0;
  /// Brings the views' bytes into the memory, behind the fence: this does not wait for it.
  virtual void upload() {}
  /// Waits for that.
  virtual void settle() const {}
  /// Brings the memory's bytes into the views.
  virtual void download() const {}
  /// Null where nothing runs late.
  [[nodiscard]] virtual std::shared_ptr<DeviceFence> fence() const { return nullptr; }
};

/// Tensors packed into one SharedMemory.
class HostStorage final : public ModelStorage {
 public:
  explicit HostStorage(const std::vector<std::uint64_t>& tensor_bytes) {
    const ArenaLayout layout = ArenaLayout::pack(tensor_bytes);
    memory_ =
        must(SharedMemory::allocate(layout.bytes == 0 ? 1 : layout.bytes, "refit-test-model"));
    for (const std::uint64_t offset : layout.offsets)
      places_.push_back({memory_, memory_->data() + offset, memory_->data() + offset});
  }
  [[nodiscard]] const std::vector<Place>& places() const override { return places_; }

 private:
  std::shared_ptr<SharedMemory> memory_;
  std::vector<Place> places_;
};

/// Tensors in shared host memory, or wherever a storage puts them.
class Model {
 public:
  Model(const std::string& module, const std::vector<TensorShape>& tensors)
      : Model(module, tensors, std::make_shared<HostStorage>(sizes_of(tensors))) {}
  Model(const std::string& module, const std::vector<TensorShape>& tensors,
        std::shared_ptr<ModelStorage> storage)
      : spec_(module), storage_(std::move(storage)), bytes_(sizes_of(tensors)) {
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      must(
          spec_.add(tensors[i].name, tensors[i].dtype, tensors[i].shape, memory_of(i), address(i)));
      names_.push_back(tensors[i].name);
    }
    spec_.set_fence(storage_->fence());
  }

  static std::uint64_t bytes_of(const TensorShape& tensor) {
    std::uint64_t bytes = element_bytes(tensor.dtype);
    for (const std::uint64_t extent : tensor.shape) bytes *= extent;
    return bytes;
  }
  static std::vector<std::uint64_t> sizes_of(const std::vector<TensorShape>& tensors) {
    std::vector<std::uint64_t> sizes;
    for (const TensorShape& tensor : tensors) sizes.push_back(bytes_of(tensor));
    return sizes;
  }

  /// Fills every tensor with bytes that depend on `seed`; see upload().
  void fill(std::uint64_t seed) {
    storage_->settle();
    std::mt19937_64 random(seed);
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      for (std::uint64_t k = 0; k < bytes_[i]; k += 8) {
        const std::uint64_t value = random();
        std::memcpy(data(i) + k, &value,
                    static_cast<std::size_t>(std::min<std::uint64_t>(8, bytes_[i] - k)));
      }
    }
    upload();
  }
  /// Makes what was written to data() the tensors' bytes. On a device they get there late, behind
  /// the module's fence; settle() waits for it.
  void upload() const { storage_->upload(); }
  void settle() const { storage_->settle(); }
  /// Makes data() what the tensors hold now.
  void download() const { storage_->download(); }

  /// What this model holds now against what was last put into `other`, or read from it.
  [[nodiscard]] bool equals(const Model& other) const {
    download();
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if (!views_equal(other, i)) return false;
    }
    return true;
  }
  [[nodiscard]] bool tensor_equals(const Model& other, std::size_t index) const {
    download();
    return views_equal(other, index);
  }

  [[nodiscard]] ModuleSpec& spec() { return spec_; }
  [[nodiscard]] const std::vector<std::string>& names() const { return names_; }
  /// For the CPU.
  [[nodiscard]] std::byte* data(std::size_t index) const { return storage_->places()[index].view; }
  [[nodiscard]] std::uint64_t bytes(std::size_t index) const { return bytes_[index]; }
  /// For a spec.
  [[nodiscard]] std::byte* address(std::size_t index) const {
    return storage_->places()[index].address;
  }
  [[nodiscard]] const std::shared_ptr<Memory>& memory_of(std::size_t index) const {
    return storage_->places()[index].memory;
  }
  /// Of a model on the host.
  [[nodiscard]] std::shared_ptr<SharedMemory> memory() const {
    return std::dynamic_pointer_cast<SharedMemory>(memory_of(0));
  }
  [[nodiscard]] ModelStorage& storage() const { return *storage_; }

 private:
  [[nodiscard]] bool views_equal(const Model& other, std::size_t index) const {
    return bytes_[index] == other.bytes_[index] &&
           std::memcmp(data(index), other.data(index), bytes_[index]) == 0;
  }

  ModuleSpec spec_;
  std::shared_ptr<ModelStorage> storage_;
  std::vector<std::string> names_;
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
