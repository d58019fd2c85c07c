// Packing, prefetching and releasing. See offload.hpp.

#include "dit/offload.hpp"

#include <algorithm>
#include <cstring>
#include <optional>
#include <refit/torch.hpp>
#include <stdexcept>

namespace dit {
namespace {

constexpr std::size_t kAlignBytes = 32;

std::size_t align_up(std::size_t bytes) { return (bytes + kAlignBytes - 1) & ~(kAlignBytes - 1); }

/// The block that a tensor belongs to: "blocks.3.attn.qkv.weight" is block 3's.
std::optional<std::size_t> block_of(const std::string& name) {
  static const std::string kPrefix = "blocks.";
  if (name.compare(0, kPrefix.size(), kPrefix) != 0) return std::nullopt;
  return std::stoul(name.substr(kPrefix.size()));
}

refit::Dims dims_of(const torch::Tensor& tensor) {
  refit::Dims dims;
  for (const std::int64_t extent : tensor.sizes())
    dims.push_back(static_cast<std::uint64_t>(extent));
  return dims;
}

torch::Tensor view_of(std::byte* data, const std::vector<std::int64_t>& shape,
                      torch::ScalarType dtype, const std::shared_ptr<refit::SharedMemory>& owner) {
  return torch::from_blob(
      data, shape, [owner](void*) {}, torch::TensorOptions().dtype(dtype));
}

}  // namespace

LayerwiseOffload::LayerwiseOffload(DiT& model, const std::string& module,
                                   std::size_t prefetch_blocks)
    : model_(model),
      prefetch_blocks_(prefetch_blocks),
      spec_(module),
      blocks_(static_cast<std::size_t>(model->config().depth)) {}

refit::Result<std::unique_ptr<LayerwiseOffload>> LayerwiseOffload::create(
    DiT& model, const std::string& module, std::size_t prefetch_blocks) {
  const auto blocks = static_cast<std::size_t>(model->config().depth);
  if (prefetch_blocks == 0 || prefetch_blocks > blocks) {
    return refit::fail(refit::Errc::bad_argument, "1 to " + std::to_string(blocks) +
                                                      " blocks can be prefetched, not " +
                                                      std::to_string(prefetch_blocks));
  }
  std::unique_ptr<LayerwiseOffload> offload(new LayerwiseOffload(model, module, prefetch_blocks));
  REFIT_TRY(offload->move_tensors());
  for (std::size_t block = 0; block < prefetch_blocks; ++block) {
    offload->blocks_[block].where = Where::coming;
    offload->fetch(block);
  }
  offload->prefetcher_ = std::thread([self = offload.get()] { self->serve(); });
  model->set_block_hooks(offload.get());
  return offload;
}

LayerwiseOffload::~LayerwiseOffload() {
  model_->set_block_hooks(nullptr);
  if (!prefetcher_.joinable()) return;
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  prefetcher_.join();
}

torch::Tensor LayerwiseOffload::placeholder(torch::ScalarType dtype) {
  for (const auto& [held, tensor] : placeholders_) {
    if (held == dtype) return tensor;
  }
  placeholders_.emplace_back(dtype, torch::zeros({1}, dtype));
  return placeholders_.back().second;
}

/// Lays everything out, copies it there, and only then points the model at it.
refit::Result<void> LayerwiseOffload::move_tensors() {
  const torch::NoGradGuard no_grad;
  struct Kept {
    std::string name;
    torch::Tensor tensor;
    std::size_t offset = 0;
  };
  struct Offloaded {
    std::string name;
    std::size_t block = 0;
    std::size_t tensor = 0;
  };
  std::vector<Kept> kept;
  std::vector<Offloaded> offloaded;
  const auto add = [&](const std::string& name, const torch::Tensor& tensor) {
    const auto index = block_of(name);
    if (!index) return kept.push_back({name, tensor, 0});
    Block& block = blocks_.at(*index);
    std::size_t buffer = 0;
    while (buffer < block.buffers.size() && block.buffers[buffer].dtype != tensor.scalar_type())
      ++buffer;
    if (buffer == block.buffers.size()) {
      block.buffers.emplace_back();
      block.buffers.back().dtype = tensor.scalar_type();
    }
    std::size_t& end = block.buffers[buffer].bytes;
    const std::size_t begin = align_up(end);
    end = begin + static_cast<std::size_t>(tensor.nbytes());
    block.tensors.push_back({tensor, tensor.sizes().vec(), buffer, begin});
    offloaded.push_back({name, *index, block.tensors.size() - 1});
  };
  for (const auto& item : model_->named_parameters()) add(item.key(), item.value());
  for (const auto& item : model_->named_buffers()) add(item.key(), item.value());

  std::size_t host_bytes = 0;
  for (Kept& one : kept) {
    one.offset = align_up(host_bytes);
    host_bytes = one.offset + static_cast<std::size_t>(one.tensor.nbytes());
  }
  std::vector<std::vector<std::size_t>> buffer_offsets(blocks_.size());
  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    std::size_t place_bytes = 0;
    for (Buffer& buffer : blocks_[i].buffers) {
      buffer_offsets[i].push_back(align_up(host_bytes));
      host_bytes = buffer_offsets[i].back() + buffer.bytes;
      buffer.place_offset = align_up(place_bytes);
      place_bytes = buffer.place_offset + buffer.bytes;
    }
    place_bytes_ = std::max(place_bytes_, align_up(place_bytes));
  }
  // What is resident, what comes meanwhile, and one more, so that a block never returns to the
  // place that it left.
  const std::size_t places = 2 * prefetch_blocks_ + 1;
  REFIT_TRY_ASSIGN(host_, refit::SharedMemory::allocate(std::max<std::size_t>(host_bytes, 1),
                                                        "refit-offload-host"));
  REFIT_TRY_ASSIGN(pool_,
                   refit::SharedMemory::allocate(std::max<std::size_t>(places * place_bytes_, 1),
                                                 "refit-offload-pool"));
  for (std::size_t place = 0; place < places; ++place) free_places_.push_back(place);

  for (std::size_t i = 0; i < blocks_.size(); ++i) {
    for (std::size_t k = 0; k < blocks_[i].buffers.size(); ++k) {
      Buffer& buffer = blocks_[i].buffers[k];
      buffer.host = host_->data() + buffer_offsets[i][k];
      REFIT_TRY_ASSIGN(buffer.index, spec_.add_layer_buffer(host_, buffer.host, buffer.bytes));
    }
  }
  spec_.add_pool(pool_);
  for (const Kept& one : kept) {
    const auto dtype = refit::dtype_of(one.tensor.scalar_type());
    if (!dtype)
      return refit::fail(refit::Errc::bad_argument, one.name + " has a dtype no refit carries");
    std::byte* data = host_->data() + one.offset;
    const torch::Tensor target =
        view_of(data, one.tensor.sizes().vec(), one.tensor.scalar_type(), host_);
    target.copy_(one.tensor);
    REFIT_TRY(spec_.add(one.name, *dtype, dims_of(one.tensor), host_, data));
  }
  for (const Offloaded& one : offloaded) {
    const Tensor& tensor = blocks_[one.block].tensors[one.tensor];
    const Buffer& buffer = blocks_[one.block].buffers[tensor.buffer];
    const auto dtype = refit::dtype_of(buffer.dtype);
    if (!dtype)
      return refit::fail(refit::Errc::bad_argument, one.name + " has a dtype no refit carries");
    std::byte* data = host_->data() + (buffer.host - host_->data()) + tensor.offset_bytes;
    view_of(data, tensor.shape, buffer.dtype, host_).copy_(tensor.parameter);
    REFIT_TRY(spec_.add(one.name, *dtype, dims_of(tensor.parameter), host_, data));
  }
  for (Kept& one : kept) {
    one.tensor.set_data(view_of(host_->data() + one.offset, one.tensor.sizes().vec(),
                                one.tensor.scalar_type(), host_));
  }
  for (Block& block : blocks_) {
    for (Tensor& tensor : block.tensors) {
      tensor.parameter.set_data(placeholder(block.buffers[tensor.buffer].dtype));
    }
  }
  return {};
}

/// Brings a block that is `coming`: all of its buffers, padding and all, to a place where it was
/// not.
void LayerwiseOffload::fetch(std::size_t index) {
  Block& block = blocks_[index];  // nobody else touches a block that is coming, but for `where`
  std::size_t place = 0;
  {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return !free_places_.empty() || stopping_; });
    if (stopping_) return;
    place = free_places_.front();
    free_places_.pop_front();
  }
  std::byte* const begin = pool_->data() + place * place_bytes_;
  {
    refit::Residency::Move move = spec_.residency()->move();
    for (const Buffer& buffer : block.buffers) {
      std::memcpy(begin + buffer.place_offset, buffer.host, buffer.bytes);
      if (auto said = move.resident(buffer.index, begin + buffer.place_offset); !said)
        throw std::logic_error(said.error().to_string());
    }
  }
  for (Tensor& tensor : block.tensors) {
    const Buffer& buffer = block.buffers[tensor.buffer];
    tensor.parameter.set_data(view_of(begin + buffer.place_offset + tensor.offset_bytes,
                                      tensor.shape, buffer.dtype, pool_));
  }
  {
    const std::lock_guard lock(mutex_);
    block.place = place;
    block.where = Where::resident;
    ++prefetch_count_;
  }
  changed_.notify_all();
}

void LayerwiseOffload::serve() {
  const torch::NoGradGuard no_grad;
  for (;;) {
    std::size_t block = 0;
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [this] { return !wanted_.empty() || stopping_; });
      if (stopping_) return;
      block = wanted_.front();
      wanted_.pop_front();
    }
    fetch(block);
  }
}

void LayerwiseOffload::ask_for(std::size_t block) {
  {
    const std::lock_guard lock(mutex_);
    if (blocks_[block].where != Where::away) return;
    blocks_[block].where = Where::coming;
    wanted_.push_back(block);
  }
  changed_.notify_all();
}

void LayerwiseOffload::before(std::size_t index) {
  if (index % prefetch_blocks_ == 0) {
    for (std::size_t ahead = 0; ahead < prefetch_blocks_; ++ahead)
      ask_for((index + prefetch_blocks_ + ahead) % blocks_.size());
  }
  ask_for(index);
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [&] { return blocks_[index].where == Where::resident; });
}

void LayerwiseOffload::after(std::size_t index) {
  const torch::NoGradGuard no_grad;
  Block& block = blocks_[index];
  for (Tensor& tensor : block.tensors)
    tensor.parameter.set_data(placeholder(block.buffers[tensor.buffer].dtype));
  {
    refit::Residency::Move move = spec_.residency()->move();
    for (const Buffer& buffer : block.buffers) move.absent(buffer.index);
  }
  {
    const std::lock_guard lock(mutex_);
    block.where = Where::away;
    free_places_.push_back(block.place);
  }
  changed_.notify_all();
}

std::size_t LayerwiseOffload::resident_blocks() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(
      std::count_if(blocks_.begin(), blocks_.end(),
                    [](const Block& block) { return block.where == Where::resident; }));
}

std::size_t LayerwiseOffload::prefetch_count() const {
  const std::lock_guard lock(mutex_);
  return prefetch_count_;
}

}  // namespace dit
