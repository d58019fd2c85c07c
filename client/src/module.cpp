#include "refit/module.hpp"

#include <algorithm>

namespace refit {

std::uint32_t ModuleSpec::add_region(const std::shared_ptr<SharedMemory>& memory) {
  const auto found = std::find(regions_.begin(), regions_.end(), memory);
  if (found != regions_.end()) return static_cast<std::uint32_t>(found - regions_.begin());
  regions_.push_back(memory);
  return static_cast<std::uint32_t>(regions_.size() - 1);
}

Result<void> ModuleSpec::add(std::string tensor, DType dtype, Dims shape,
                             const std::shared_ptr<SharedMemory>& memory, const void* data,
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
  tensors_.push_back(std::move(spec));
  return {};
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
