// Layer-wise offload of a DiT's blocks: their weights live on the host, and a few blocks at a time
// have a second place, which is "the device". Here the device is another buffer of host memory.
//
// It works as SGLang's does: one consolidated buffer per block and dtype, tensors in it at 32-byte
// aligned starts; a block that is away has parameters which all are one placeholder of one element;
// a prefetch copies a block's whole buffers to a fresh place and points its parameters there.
// Threads: the caller's, which runs the model, and a prefetch thread of its own. Knows refit's
// ModuleSpec and Residency, no session.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <memory>
#include <mutex>
#include <refit/module.hpp>
#include <refit/residency.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "dit/dit.hpp"

namespace dit {

class LayerwiseOffload final : public BlockHooks {
 public:
  /// Moves every tensor of `model` into shared memory and its blocks out of the device; the first
  /// `prefetch_blocks` are resident when it returns. `model` must outlive it and is run through it.
  static refit::Result<std::unique_ptr<LayerwiseOffload>> create(DiT& model,
                                                                 const std::string& module,
                                                                 std::size_t prefetch_blocks);
  ~LayerwiseOffload() override;
  LayerwiseOffload(const LayerwiseOffload&) = delete;
  LayerwiseOffload& operator=(const LayerwiseOffload&) = delete;

  /// What the engine registers.
  [[nodiscard]] const refit::ModuleSpec& spec() const noexcept { return spec_; }

  /// Waits until the block is resident, and asks for the ones after the next when it is their turn.
  void before(std::size_t block) override;
  /// The block is away again.
  void after(std::size_t block) override;

  [[nodiscard]] std::size_t resident_blocks() const;
  [[nodiscard]] std::size_t prefetch_count() const;

 private:
  struct Tensor {
    torch::Tensor parameter;  ///< of the model; its data is a view into a place, or a placeholder
    std::vector<std::int64_t> shape;
    std::size_t buffer = 0;  ///< among the block's
    std::size_t offset_bytes = 0;
  };
  struct Buffer {
    torch::ScalarType dtype = torch::kFloat32;
    std::uint32_t index = 0;  ///< of the module's layer buffers
    const std::byte* host = nullptr;
    std::size_t bytes = 0;
    std::size_t place_offset = 0;  ///< from the start of the block's place
  };
  enum class Where { away, coming, resident };
  struct Block {
    std::vector<Tensor> tensors;
    std::vector<Buffer> buffers;
    Where where = Where::away;
    std::size_t place = 0;  ///< while it is resident
  };

  LayerwiseOffload(DiT& model, const std::string& module, std::size_t prefetch_blocks);
  refit::Result<void> move_tensors();
  void ask_for(std::size_t block);
  void fetch(std::size_t block);
  void serve();
  torch::Tensor placeholder(torch::ScalarType dtype);

  DiT& model_;
  std::size_t prefetch_blocks_;
  refit::ModuleSpec spec_;
  std::shared_ptr<refit::SharedMemory> host_;
  std::shared_ptr<refit::SharedMemory> pool_;
  std::size_t place_bytes_ = 0;
  std::vector<std::pair<torch::ScalarType, torch::Tensor>> placeholders_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Block> blocks_;
  std::deque<std::size_t> free_places_;  ///< taken in front, given back behind: addresses move
  std::deque<std::size_t> wanted_;
  std::size_t prefetch_count_ = 0;
  bool stopping_ = false;
  std::thread prefetcher_;
};

}  // namespace dit
