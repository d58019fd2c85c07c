// The libtorch adapter: a torch::nn::Module's tensors as a ModuleSpec. Those on the CPU are moved
// into shared memory once, so that they live there; those on a CUDA device are shared where they
// lie.
//
// Header only and C++17, libtorch 1.13 up to a current one; the only public header that knows
// torch, and of CUDA no header at all. Threads: none of its own; nobody else may use the module
// during a call. Knows nothing of sessions and daemons: it makes the ModuleSpec that Trainer and
// Engine register.
#pragma once

#include <torch/nn/module.h>
#include <torch/types.h>
#include <torch/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "refit/memory.hpp"
#include "refit/module.hpp"
#include "refit/result.hpp"
#include "refit/types.hpp"

namespace refit {

struct TorchModuleOptions {
  std::string prefix;                 ///< put before every tensor's name, for example "model."
  const char* label = "refit-torch";  ///< the shared memory's name in /proc/PID/maps
  /// The CUstream that the module's work on its CUDA tensors runs on; null is the default stream,
  /// which torch uses unless told otherwise. Refits come after what it holds.
  void* stream = nullptr;
};

/// The dtype of this project for torch's; nothing for those that it does not know (complex,
/// quantized).
inline std::optional<DType> dtype_of(torch::ScalarType type) noexcept {
  switch (type) {
    case torch::kFloat64:
      return DType::float64;
    case torch::kFloat32:
      return DType::float32;
    case torch::kFloat16:
      return DType::float16;
    case torch::kBFloat16:
      return DType::bfloat16;
#if TORCH_VERSION_MAJOR > 2 || (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR >= 1)
    case torch::kFloat8_e4m3fn:
      return DType::float8_e4m3fn;
    case torch::kFloat8_e5m2:
      return DType::float8_e5m2;
#endif
    case torch::kInt64:
      return DType::int64;
    case torch::kInt32:
      return DType::int32;
    case torch::kInt16:
      return DType::int16;
    case torch::kInt8:
      return DType::int8;
    case torch::kUInt8:
      return DType::uint8;
    case torch::kBool:
      return DType::boolean;
    default:
      return std::nullopt;
  }
}

namespace detail {

struct TorchEntry {
  std::string name;
  torch::Tensor tensor;
  std::size_t slot = 0;  ///< entries that are the same memory share one
};

// Parameters first, then buffers, each in torch's own order. A C++ module has no non-persistent
// buffers.
inline std::vector<TorchEntry> torch_entries(const torch::nn::Module& module,
                                             const std::string& prefix) {
  std::vector<TorchEntry> entries;
  for (const auto& item : module.named_parameters())
    entries.push_back({prefix + item.key(), item.value(), 0});
  for (const auto& item : module.named_buffers())
    entries.push_back({prefix + item.key(), item.value(), 0});
  return entries;
}

inline Dims dims_of(const torch::Tensor& tensor) {
  Dims dims;
  for (const std::int64_t extent : tensor.sizes())
    dims.push_back(static_cast<std::uint64_t>(extent));
  return dims;
}

// Why a tensor cannot be shared, or an empty string.
inline std::string torch_objection(const torch::Tensor& tensor) {
  if (tensor.layout() != torch::kStrided) return "is not a dense tensor";
  if (!tensor.device().is_cpu() && !tensor.device().is_cuda()) {
    return "is on device " + tensor.device().str() +
           "; this adapter shares tensors of the CPU and of CUDA devices: move the module there "
           "first";
  }
  if (tensor.device().is_cuda() && tensor.numel() != 0) {
    for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
      if (tensor.size(dim) > 1 && tensor.stride(dim) == 0)
        return "is expanded, so that several of its elements are one; make it contiguous";
    }
  }
  if (!dtype_of(tensor.scalar_type())) {
    return std::string("has dtype ") + torch::toString(tensor.scalar_type()) +
           ", which no refit carries";
  }
  return {};
}

// One past the last byte that shape and strides reach; the first byte for an empty tensor.
inline const std::byte* torch_end(const torch::Tensor& tensor) {
  const auto* begin = static_cast<const std::byte*>(tensor.data_ptr());
  if (tensor.numel() == 0) return begin;
  std::size_t last = 0;
  for (std::int64_t dim = 0; dim < tensor.dim(); ++dim) {
    last += static_cast<std::size_t>(tensor.size(dim) - 1) *
            static_cast<std::size_t>(tensor.stride(dim));
  }
  return begin + (last + 1) * static_cast<std::size_t>(tensor.element_size());
}

inline bool same_tensor(const torch::Tensor& a, const torch::Tensor& b) {
  if (a.unsafeGetTensorImpl() == b.unsafeGetTensorImpl()) return true;
  return a.numel() != 0 && a.data_ptr() == b.data_ptr() && a.scalar_type() == b.scalar_type() &&
         a.sizes() == b.sizes() && a.strides() == b.strides();
}

// Gives every entry its slot; returns the first entry of each slot. Quadratic only among tensors at
// one address.
inline std::vector<std::size_t> assign_torch_slots(std::vector<TorchEntry>& entries) {
  std::vector<std::size_t> firsts;
  std::multimap<const void*, std::size_t> slots_by_address;
  for (std::size_t i = 0; i < entries.size(); ++i) {
    const void* address = entries[i].tensor.data_ptr();
    const auto [begin, end] = slots_by_address.equal_range(address);
    const auto known = std::find_if(begin, end, [&](const auto& slot) {
      return same_tensor(entries[firsts[slot.second]].tensor, entries[i].tensor);
    });
    if (known != end) {
      entries[i].slot = known->second;
      continue;
    }
    entries[i].slot = firsts.size();
    slots_by_address.emplace(address, firsts.size());
    firsts.push_back(i);
  }
  return firsts;
}

// Two tensors that share some bytes but are not the same tensor would silently come apart: one line
// for each pair found.
inline std::vector<std::string> torch_overlaps(const std::vector<TorchEntry>& entries,
                                               std::vector<std::size_t> firsts) {
  firsts.erase(std::remove_if(firsts.begin(), firsts.end(),
                              [&](std::size_t i) { return entries[i].tensor.numel() == 0; }),
               firsts.end());
  const auto begin_of = [&](std::size_t i) {
    return static_cast<const std::byte*>(entries[i].tensor.data_ptr());
  };
  std::sort(firsts.begin(), firsts.end(),
            [&](std::size_t a, std::size_t b) { return begin_of(a) < begin_of(b); });
  std::vector<std::string> lines;
  std::size_t widest = 0;
  for (std::size_t k = 1; k < firsts.size(); ++k) {
    const TorchEntry& reaching = entries[firsts[widest]];
    if (begin_of(firsts[k]) < torch_end(reaching.tensor)) {
      lines.push_back("tensor \"" + entries[firsts[k]].name +
                      "\" shares a part of its memory with \"" + reaching.name +
                      "\"; clone one of them");
    }
    if (torch_end(entries[firsts[k]].tensor) > torch_end(reaching.tensor)) widest = k;
  }
  return lines;
}

inline std::size_t torch_span_bytes(const torch::Tensor& tensor) {
  return static_cast<std::size_t>(torch_end(tensor) -
                                  static_cast<const std::byte*>(tensor.data_ptr()));
}

// Memory of a device, and the tensors in it: who holds the one holds the other.
struct TorchDeviceMemory {
  std::shared_ptr<DeviceMemory> memory;
  std::vector<torch::Tensor> tensors;
};

// The allocations that CUDA tensors lie in, each shared once however many tensors it has.
inline Result<std::vector<std::shared_ptr<TorchDeviceMemory>>> share_torch_devices(
    std::vector<TorchEntry> entries, const std::string& module) {
  std::sort(entries.begin(), entries.end(), [](const TorchEntry& a, const TorchEntry& b) {
    return a.tensor.data_ptr() < b.tensor.data_ptr();
  });
  std::vector<std::shared_ptr<TorchDeviceMemory>> all;
  for (const TorchEntry& entry : entries) {
    const std::size_t bytes = torch_span_bytes(entry.tensor);
    if (all.empty() || !all.back()->memory->contains(entry.tensor.data_ptr(), bytes)) {
      auto next = std::make_shared<TorchDeviceMemory>();
      REFIT_TRY_ASSIGN(next->memory,
                       DeviceMemory::share(entry.tensor.data_ptr(), bytes,
                                           "module \"" + module + "\", \"" + entry.name + "\""));
      all.push_back(std::move(next));
    }
    all.back()->tensors.push_back(entry.tensor);
  }
  return all;
}

inline Result<ModuleSpec> share_torch_module(torch::nn::Module& module, const std::string& name,
                                             const TorchModuleOptions& options) {
  const torch::NoGradGuard no_grad;
  std::vector<TorchEntry> entries = torch_entries(module, options.prefix);
  if (entries.empty()) {
    return fail(Errc::bad_argument, "module \"" + name + "\" has neither parameters nor buffers");
  }

  std::vector<std::string> problems;
  for (const TorchEntry& entry : entries) {
    const std::string objection = torch_objection(entry.tensor);
    if (!objection.empty()) problems.push_back("tensor \"" + entry.name + "\" " + objection);
  }
  std::vector<std::size_t> firsts;
  if (problems.empty()) {  // only dense tensors have addresses to compare
    firsts = assign_torch_slots(entries);
    problems = torch_overlaps(entries, firsts);
  }
  // A fence is of one device, and a refit that waits for none of another's work would be wrong.
  std::optional<torch::Device> device;
  for (const TorchEntry& entry : entries) {
    if (!problems.empty() || !entry.tensor.device().is_cuda()) continue;
    if (!device) device = entry.tensor.device();
    if (*device != entry.tensor.device()) {
      problems.push_back("tensor \"" + entry.name + "\" is on device " +
                         entry.tensor.device().str() + ", others are on " + device->str() +
                         "; share a module for each device");
    }
  }
  if (!problems.empty()) {
    std::sort(problems.begin(), problems.end());
    return fail(Errc::bad_argument, "module \"" + name + "\" cannot be shared; nothing was changed",
                std::move(problems));
  }

  const auto stays = [](const torch::Tensor& tensor) {
    return tensor.device().is_cuda() && tensor.numel() != 0;
  };
  std::vector<TorchEntry> on_device;
  std::vector<std::uint64_t> sizes;
  sizes.reserve(firsts.size());
  for (const std::size_t first : firsts) {
    const bool there = stays(entries[first].tensor);
    if (there) on_device.push_back(entries[first]);
    sizes.push_back(there ? 0 : static_cast<std::uint64_t>(entries[first].tensor.nbytes()));
  }
  REFIT_TRY_ASSIGN(const auto devices, share_torch_devices(on_device, name));
  const ArenaLayout layout = ArenaLayout::pack(sizes);
  std::shared_ptr<SharedMemory> memory;
  if (on_device.size() < firsts.size()) {
    // A module of empty tensors alone still gets a region, so that it can be registered.
    REFIT_TRY_ASSIGN(memory, SharedMemory::allocate(
                                 static_cast<std::size_t>(std::max<std::uint64_t>(layout.bytes, 1)),
                                 options.label));
  }

  // Everything that can fail comes before the first set_data, so that a module is moved whole or
  // not at all.
  ModuleSpec spec(name);
  if (!devices.empty()) {
    REFIT_TRY_ASSIGN(auto fence, DeviceFence::behind(*devices.front()->memory, options.stream));
    spec.set_fence(std::move(fence));
  }
  std::vector<torch::Tensor> moved;
  moved.reserve(firsts.size());
  for (std::size_t slot = 0; slot < firsts.size(); ++slot) {
    const TorchEntry& entry = entries[firsts[slot]];
    if (stays(entry.tensor)) {
      const void* const place = entry.tensor.data_ptr();
      const std::size_t bytes = torch_span_bytes(entry.tensor);
      const auto held = std::find_if(devices.begin(), devices.end(), [&](const auto& one) {
        return one->memory->contains(place, bytes);
      });
      Dims strides;
      if (!entry.tensor.is_contiguous()) {
        for (const std::int64_t stride : entry.tensor.strides())
          strides.push_back(static_cast<std::uint64_t>(stride));
      }
      REFIT_TRY(spec.add(entry.name, *dtype_of(entry.tensor.scalar_type()), dims_of(entry.tensor),
                         std::shared_ptr<Memory>(*held, (*held)->memory.get()), place,
                         std::move(strides)));
      moved.push_back(entry.tensor);
      continue;
    }
    std::byte* place = memory->data() + layout.offsets[slot];
    if (entry.tensor.device().is_cuda()) {  // empty: it has no bytes to be anywhere
      REFIT_TRY(spec.add(entry.name, *dtype_of(entry.tensor.scalar_type()), dims_of(entry.tensor),
                         memory, place));
      moved.push_back(entry.tensor);
      continue;
    }
    // The deleter owns a reference: the bytes outlive the spec for as long as torch uses them.
    torch::Tensor target = torch::from_blob(
        place, entry.tensor.sizes(), [memory](void*) {},
        torch::TensorOptions().dtype(entry.tensor.scalar_type()));
    target.copy_(entry.tensor);
    REFIT_TRY(spec.add(entry.name, *dtype_of(entry.tensor.scalar_type()), dims_of(entry.tensor),
                       memory, place));
    moved.push_back(std::move(target));
  }
  // set_data swaps the storage under the same TensorImpl: an optimizer that exists already keeps
  // its state, and requires_grad and .grad stay.
  for (TorchEntry& entry : entries) {
    if (entry.tensor.device().is_cpu()) entry.tensor.set_data(moved[entry.slot]);
  }
  return spec;
}

inline Result<void> check_torch_module(const torch::nn::Module& module, const ModuleSpec& spec,
                                       const std::string& prefix) {
  std::map<std::string, const TensorSpec*> by_name;
  for (const TensorSpec& tensor : spec.tensors()) by_name.emplace(tensor.name, &tensor);
  std::map<const void*, std::string> places;
  std::vector<std::string> problems;
  const auto place_of = [&](const TensorSpec& tensor) {
    return static_cast<const void*>(spec.regions()[tensor.region]->data() + tensor.offset_bytes);
  };
  for (const TensorSpec& tensor : spec.tensors()) places.emplace(place_of(tensor), tensor.name);

  for (const TorchEntry& entry : torch_entries(module, prefix)) {
    if (entry.tensor.numel() == 0) continue;  // newer libtorch gives empty tensors a null data_ptr
    const auto known = by_name.find(entry.name);
    const bool tied = known == by_name.end();
    const bool lives = (entry.tensor.device().is_cuda() || entry.tensor.is_contiguous()) &&
                       (tied ? places.count(entry.tensor.data_ptr()) != 0
                             : entry.tensor.data_ptr() == place_of(*known->second));
    if (!lives)
      problems.push_back("tensor \"" + entry.name + "\" does not live in its shared memory");
  }
  if (problems.empty()) return {};
  std::sort(problems.begin(), problems.end());
  return fail(Errc::bad_region,
              "module \"" + spec.name() +
                  "\": tensors left shared memory, so refits do not reach them (Module::to and "
                  "torch::load replace "
                  "storage); share the module again and register it again",
              std::move(problems));
}

}  // namespace detail

/// Moves every parameter and buffer of `module` that is on the CPU into one new SharedMemory,
/// values kept, shares those on a CUDA device where they lie, and lists them all under the names
/// that named_parameters() and named_buffers() give.
///
/// Call it once, before or after an optimizer was made: parameters keep their identity,
/// requires_grad and grad. Tied tensors stay tied and are listed once, under their first name.
/// Tensors that are not contiguous become so. Views that code of your own took of a parameter
/// before the call still see the old memory. After it, do not call Module::to or torch::load on the
/// module, which replace storage; check_torch_module tells.
///
/// CUDA tensors keep their addresses and strides, and refits come behind options.stream: with work
/// on other streams, let that one wait for them. The whole allocations are shared that they lie in,
/// by legacy CUDA IPC or by fds, as torch's allocator made them: docs/gpu.md. The manifest keeps
/// the tensors, so that their memory is not given back while it is registered.
///
/// @return The manifest, which holds the memory (so does every tensor); Errc::bad_argument with
/// every tensor that
///         cannot be shared (on no CPU and no CUDA device, on a second CUDA device, not dense,
///         unknown dtype, part of another tensor) or if there is none; Errc::os if the memory is
///         not to be had; what DeviceMemory::share says of CUDA memory. In all of these nothing was
///         changed.
/// Blocks: for one copy of the module. Allocates: yes.
[[nodiscard]] inline Result<ModuleSpec> share_torch_module(torch::nn::Module& module,
                                                           const std::string& name,
                                                           const TorchModuleOptions& options = {}) {
  try {
    return detail::share_torch_module(module, name, options);
  } catch (const std::exception& error) {
    return fail(Errc::bad_argument, "module \"" + name + "\": libtorch refused: " + error.what());
  }
}

/// Proves that every tensor of `module` still lives where `spec`, made by share_torch_module with
/// the same prefix, says. Errors: Errc::bad_region with every tensor that moved away. Costs a
/// comparison of addresses.
[[nodiscard]] inline Result<void> check_torch_module(const torch::nn::Module& module,
                                                     const ModuleSpec& spec,
                                                     const std::string& prefix = {}) {
  try {
    return detail::check_torch_module(module, spec, prefix);
  } catch (const std::exception& error) {
    return fail(Errc::bad_argument,
                "module \"" + spec.name() + "\": libtorch refused: " + error.what());
  }
}

}  // namespace refit
