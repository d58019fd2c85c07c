#include "server/decode.hpp"

#include <algorithm>

namespace refit::daemon {
namespace {

Dims dims(const flatbuffers::Vector<std::uint64_t>* values) {
  return values == nullptr ? Dims{} : Dims(values->begin(), values->end());
}

template <typename Vector>
std::size_t count(const Vector* vector) {
  return vector == nullptr ? 0 : vector->size();
}

Result<void> bounded(std::size_t value, std::size_t limit, const std::string& module,
                     const char* what) {
  if (value <= limit) return {};
  return fail(Errc::quota, module + ": " + std::to_string(value) + " " + what + "; the limit is " +
                               std::to_string(limit));
}

}  // namespace

Result<std::string> decode_name(const flatbuffers::String* text, const char* what) {
  const std::string_view name = view(text);
  if (name.empty()) return fail(Errc::bad_argument, std::string("the ") + what + " has no name");
  if (name.size() > kNameBytesMax) {
    return fail(Errc::bad_argument, std::string("the name of the ") + what + " is longer than " +
                                        std::to_string(kNameBytesMax) + " bytes");
  }
  const bool printable = std::all_of(
      name.begin(), name.end(), [](unsigned char c) { return c > 0x20 && c != 0x7f && c != '/'; });
  if (!printable) {
    return fail(Errc::bad_argument, std::string("the name of the ") + what +
                                        " holds a space, a control character or '/'");
  }
  return std::string(name);
}

Result<RegisterRequest> decode(const wire::RegisterModule& message, const ManifestLimits& limits) {
  RegisterRequest request;
  REFIT_TRY_ASSIGN(request.module, decode_name(message.module_name(), "module"));
  REFIT_TRY(bounded(count(message.regions()), limits.regions_max, request.module, "regions"));
  REFIT_TRY(bounded(count(message.tensors()), limits.tensors_max, request.module, "tensors"));
  REFIT_TRY(
      bounded(count(message.name_map()), limits.name_rules_max, request.module, "name rules"));
  if (message.regions() != nullptr) {
    for (const auto* region : *message.regions())
      request.regions.push_back({region->ticket(), region->bytes()});
  }
  if (message.tensors() != nullptr) {
    request.tensors.reserve(message.tensors()->size());
    for (const auto* tensor : *message.tensors()) {
      TensorSpec spec;
      spec.name = view(tensor->name());
      spec.dtype = static_cast<DType>(tensor->dtype());
      spec.shape = dims(tensor->shape());
      spec.strides = dims(tensor->strides());
      spec.region = tensor->region();
      spec.offset_bytes = tensor->offset();
      spec.global_shape = dims(tensor->global_shape());
      spec.box_offset = dims(tensor->box_offset());
      request.tensors.push_back(std::move(spec));
    }
  }
  if (message.name_map() != nullptr) {
    for (const auto* rule : *message.name_map()) {
      request.name_map.push_back({std::string(view(rule->pattern())),
                                  std::string(view(rule->target())), rule->part(), rule->parts()});
    }
  }
  request.version = message.version();
  request.transaction = from_wire(message.transaction());
  request.poisoned = message.poisoned();
  return request;
}

}  // namespace refit::daemon
