#include "refit/module.hpp"

#include <algorithm>

#include "residency_state.hpp"

namespace refit {

std::uint32_t ModuleSpec::add_region(const std::shared_ptr<Memory>& memory) {
  const auto found = std::find(regions_.begin(), regions_.end(), memory);
  if (found != regions_.end()) return static_cast<std::uint32_t>(found - regions_.begin());
  regions_.push_back(memory);
  return static_cast<std::uint32_t>(regions_.size() - 1);
}

Result<void> ModuleSpec::add(std::string tensor, DType dtype, Dims shape,
                             const std::shared_ptr<Memory>& memory, const void* data,
                             Dims strides) {
  if (!memory->contains(data, 0)) {
    return fail(Errc::bad_region,
                name_ + ": tensor " + tensor + " does not lie in the shared memory that was named");
  }
  TensorSpec spec;
  spec.name = std::move(tensor);
  spec.dtype = dtype;
  spec.shape = std::move(shape);
  spec.strides = std::move(strides);
  spec.region = add_region(memory);
  spec.offset_bytes =
      static_cast<std::uint64_t>(static_cast<const std::byte*>(data) - memory->data());
  const auto* begin = static_cast<const std::byte*>(data);
  for (std::size_t i = 0; i < layer_begins_.size(); ++i) {
    if (begin < layer_begins_[i] || begin >= layer_begins_[i] + layer_bytes_[i]) continue;
    spec.layer_buffer = static_cast<std::uint32_t>(i);
    spec.layer_offset_bytes = static_cast<std::uint64_t>(begin - layer_begins_[i]);
  }
  tensors_.push_back(std::move(spec));
  return {};
}

Result<std::uint32_t> ModuleSpec::add_layer_buffer(const std::shared_ptr<Memory>& memory,
                                                   const void* data, std::uint64_t bytes) {
  if (!memory->contains(data, bytes)) {
    return fail(Errc::bad_region, name_ + ": layer buffer " + std::to_string(layer_bytes_.size()) +
                                      " does not lie in the shared memory that was named");
  }
  if (residency_ == nullptr) residency_ = std::make_shared<Residency>();
  residency_->state_->add_buffer(bytes);
  layer_begins_.push_back(static_cast<const std::byte*>(data));
  layer_bytes_.push_back(bytes);
  return static_cast<std::uint32_t>(layer_bytes_.size() - 1);
}

std::uint32_t ModuleSpec::add_pool(const std::shared_ptr<Memory>& memory) {
  const std::uint32_t region = add_region(memory);
  if (is_pool(region)) return region;
  pools_.push_back(region);
  if (residency_ == nullptr) residency_ = std::make_shared<Residency>();
  residency_->state_->add_pool(region, memory);
  return region;
}

bool ModuleSpec::is_pool(std::uint32_t region) const noexcept {
  return std::find(pools_.begin(), pools_.end(), region) != pools_.end();
}

ArenaLayout ArenaLayout::pack(const std::vector<std::uint64_t>& tensor_bytes,
                              std::uint64_t align_bytes) {
  ArenaLayout layout;
  layout.offsets.reserve(tensor_bytes.size());
  for (const std::uint64_t bytes : tensor_bytes) {
    layout.bytes = (layout.bytes + align_bytes - 1) / align_bytes * align_bytes;
    layout.offsets.push_back(layout.bytes);
    layout.bytes += bytes;
  }
  return layout;
}

}  // namespace refit
