// OffloadedModel: an engine's module whose layers have device places that come, go and move.
//
// Layers as layer-wise offload packs them: one consolidated buffer per layer and dtype, tensors at
// 32-byte aligned starts, padding between them. The pool is whatever its maker makes: host memory
// that stands for a device's, or a device's. Any thread may fetch and drop layers; `still()` is
// held to look at all of it.
#pragma once

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "refit/residency.hpp"
#include "support/model.hpp"

namespace refit::test {

/// What a trainer registers for an OffloadedModel of as many layers. Layers are about 44 * `width`
/// bytes large.
inline std::vector<TensorShape> layered_tensors(std::size_t layers, std::uint64_t width = 1) {
  std::vector<TensorShape> tensors{{"embed", DType::float32, {37}}};
  for (std::size_t i = 0; i < layers; ++i) {
    const std::string layer = "layers." + std::to_string(i);
    tensors.push_back({layer + ".a", DType::float32, {3, 3}});
    tensors.push_back({layer + ".b", DType::float32, {5}});
    tensors.push_back({layer + ".c", DType::float32, {width, 11}});
    tensors.push_back({layer + ".h", DType::bfloat16, {7}});
    tensors.push_back({layer + ".i", DType::bfloat16, {2, 9}});
  }
  tensors.push_back({"norm_out", DType::bfloat16, {19}});
  return tensors;
}

class OffloadedModel {
 public:
  static constexpr std::uint8_t kHostPadding = 0xa5;
  static constexpr std::uint8_t kPoolEmpty = 0x5a;

  using PoolMaker =
      std::function<std::shared_ptr<ModelStorage>(const std::vector<std::uint64_t>& bytes)>;

  OffloadedModel(
      const std::string& module, std::size_t layers, std::size_t places, std::uint64_t width = 1,
      const PoolMaker& make_pool =
          [](const auto& bytes) { return std::make_shared<HostStorage>(bytes); })
      : spec_(module), layers_(layers) {
    const std::vector<TensorShape> tensors = layered_tensors(layers, width);
    std::size_t bytes = 0;
    const auto take = [&bytes](std::size_t size) {
      const std::size_t begin = (bytes + 31) / 32 * 32;
      bytes = begin + size;
      return begin;
    };
    // Where everything goes: the tensors that stay, then each layer's buffers.
    for (const TensorShape& shape : tensors) {
      tensors_.push_back({shape, 0, kNoLayer, 0});
      if (shape.name.rfind("layers.", 0) != 0)
        tensors_.back().offset = take(Model::bytes_of(shape));
    }
    for (std::size_t layer = 0; layer < layers; ++layer) {
      const std::string prefix = "layers." + std::to_string(layer) + ".";
      std::size_t place_end = 0;
      for (const DType dtype : {DType::float32, DType::bfloat16}) {
        Buffer buffer;
        buffer.host_offset = take(0);
        buffer.place_offset = (place_end + 31) / 32 * 32;
        for (Tensor& tensor : tensors_) {
          if (tensor.shape.name.rfind(prefix, 0) != 0 || tensor.shape.dtype != dtype) continue;
          tensor.offset = take(Model::bytes_of(tensor.shape));
          tensor.layer = layer;
          tensor.place_offset = buffer.place_offset + tensor.offset - buffer.host_offset;
        }
        buffer.bytes = bytes - buffer.host_offset;
        place_end = buffer.place_offset + buffer.bytes;
        layers_[layer].buffers.push_back(buffer);
      }
      place_bytes_ = std::max(place_bytes_, (place_end + 31) / 32 * 32 + kGapBytes);
    }
    host_ = must(SharedMemory::allocate(bytes + kGapBytes, "refit-test-host"));
    pool_bytes_ = places * place_bytes_;
    pool_ = make_pool({pool_bytes_});
    std::memset(host_->data(), kHostPadding, host_->bytes());
    std::memset(pool_view(), kPoolEmpty, pool_bytes_);
    write_pool();
    // What lies further behind is as unlikely to be hit as any other memory of the process.
    host_bytes_ = bytes + kGapBytes;
    pool_shadow_.assign(pool_view(), pool_view() + pool_bytes_);
    for (Layer& layer : layers_) {
      for (Buffer& buffer : layer.buffers) {
        buffer.index =
            must(spec_.add_layer_buffer(host_, host_->data() + buffer.host_offset, buffer.bytes));
      }
    }
    spec_.add_pool(pool_->places().front().memory);
    for (const Tensor& tensor : tensors_) {
      must(spec_.add(tensor.shape.name, tensor.shape.dtype, tensor.shape.shape, host_,
                     host_->data() + tensor.offset));
    }
    for (std::size_t i = 0; i < places; ++i) free_places_.push_back(i);
  }

  [[nodiscard]] ModuleSpec& spec() { return spec_; }
  [[nodiscard]] std::size_t layers() const { return layers_.size(); }
  [[nodiscard]] std::unique_lock<std::mutex> still() { return std::unique_lock(mutex_); }
  /// Changes a byte behind everybody's back.
  void spoil_pool(std::size_t offset) {
    pool_->download();
    pool_view()[offset] ^= std::byte{1};
    write_pool();
  }
  [[nodiscard]] bool resident(std::size_t layer) const { return layers_[layer].place >= 0; }

  /// Copies a layer to the place that has been free for longest.
  void fetch(std::size_t index) {
    Residency::Move move = spec_.residency()->move();
    const std::lock_guard lock(mutex_);
    Layer& layer = layers_[index];
    if (layer.place >= 0 || free_places_.empty()) return;
    layer.place = static_cast<std::ptrdiff_t>(free_places_.front());
    free_places_.erase(free_places_.begin());
    pool_->download();
    for (const Buffer& buffer : layer.buffers) {
      const std::size_t begin = place_of(layer) + buffer.place_offset;
      std::memcpy(pool_view() + begin, host_->data() + buffer.host_offset, buffer.bytes);
      std::memcpy(pool_shadow_.data() + begin, host_->data() + buffer.host_offset, buffer.bytes);
    }
    write_pool();
    for (const Buffer& buffer : layer.buffers) {
      std::byte* const pool = pool_->places().front().address;
      must(move.resident(buffer.index, pool + place_of(layer) + buffer.place_offset));
    }
  }
  /// Leaves nothing where the layer was.
  void drop(std::size_t index) {
    Residency::Move move = spec_.residency()->move();
    const std::lock_guard lock(mutex_);
    Layer& layer = layers_[index];
    if (layer.place < 0) return;
    for (const Buffer& buffer : layer.buffers) move.absent(buffer.index);
    pool_->download();
    std::memset(pool_view() + place_of(layer), kPoolEmpty, place_bytes_);
    write_pool();
    std::memset(pool_shadow_.data() + place_of(layer), kPoolEmpty, place_bytes_);
    free_places_.push_back(static_cast<std::size_t>(layer.place));
    layer.place = -1;
  }

  /// Every byte of the host memory and of the pool is what a refit from `source` must leave,
  /// padding, gaps and places without a layer included. Under still().
  [[nodiscard]] bool holds_exactly(const Model& source) {
    std::vector<std::byte> expected(host_bytes_, std::byte{kHostPadding});
    for (std::size_t i = 0; i < tensors_.size(); ++i) {
      const Tensor& tensor = tensors_[i];
      std::memcpy(expected.data() + tensor.offset, source.data(i), source.bytes(i));
      if (tensor.layer == kNoLayer || !resident(tensor.layer)) continue;
      std::memcpy(pool_shadow_.data() + place_of(layers_[tensor.layer]) + tensor.place_offset,
                  source.data(i), source.bytes(i));
    }
    pool_->download();
    return std::memcmp(expected.data(), host_->data(), expected.size()) == 0 &&
           std::memcmp(pool_shadow_.data(), pool_view(), pool_shadow_.size()) == 0;
  }

 private:
  static constexpr std::size_t kNoLayer = static_cast<std::size_t>(-1);
  static constexpr std::size_t kGapBytes = 96;  ///< behind every place: nobody's

  struct Tensor {
    TensorShape shape;
    std::size_t offset = 0;
    std::size_t layer = kNoLayer;
    std::size_t place_offset = 0;
  };
  struct Buffer {
    std::uint32_t index = 0;
    std::size_t host_offset = 0;
    std::size_t place_offset = 0;
    std::size_t bytes = 0;
  };
  struct Layer {
    std::vector<Buffer> buffers;
    std::ptrdiff_t place = -1;
  };
  [[nodiscard]] std::byte* pool_view() const { return pool_->places().front().view; }
  /// All of it, so that nothing of it is queued when a layer is said to be there.
  void write_pool() {
    pool_->upload();
    pool_->settle();
  }
  [[nodiscard]] std::size_t place_of(const Layer& layer) const {
    return static_cast<std::size_t>(layer.place) * place_bytes_;
  }

  ModuleSpec spec_;
  std::vector<Layer> layers_;
  std::vector<Tensor> tensors_;
  std::size_t place_bytes_ = 0;
  std::size_t host_bytes_ = 0;
  std::shared_ptr<SharedMemory> host_;
  std::shared_ptr<ModelStorage> pool_;
  std::size_t pool_bytes_ = 0;
  std::mutex mutex_;
  std::vector<std::byte> pool_shadow_;
  std::vector<std::size_t> free_places_;
};

/// Prefetches and drops layers at random until destroyed.
class Prefetcher {
 public:
  explicit Prefetcher(OffloadedModel& model, std::uint64_t seed = 1)
      : thread_([this, &model, seed] {
          std::mt19937_64 random(seed);
          while (!stop_.load()) {
            const std::size_t layer = random() % model.layers();
            if (random() % 2 == 0) {
              model.fetch(layer);
            } else {
              model.drop(layer);
            }
            ++moves_;
            std::this_thread::yield();
          }
        }) {}
  ~Prefetcher() {
    stop_.store(true);
    thread_.join();
  }
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;
  [[nodiscard]] int moves() const { return moves_.load(); }

 private:
  std::atomic<bool> stop_{false};
  std::atomic<int> moves_{0};
  std::thread thread_;
};

}  // namespace refit::test
