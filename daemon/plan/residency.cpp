// The checks of residency words; see residency.hpp. Pure, any thread.
#include "plan/residency.hpp"

#include <algorithm>
#include <string>
#include <tuple>

#include "ipc/residency_word.hpp"
#include "plan/text.hpp"

namespace refit::daemon {
namespace {

std::string subject(const Manifest& manifest, std::uint32_t buffer) {
  std::string text = manifest.label() + ": layer buffer " + std::to_string(buffer);
  for (const TensorSpec& tensor : manifest.tensors()) {
    if (tensor.layer_buffer == buffer) return text + " (tensor " + in_quotes(tensor.name) + ")";
  }
  return text;
}

}  // namespace

Result<LayerPlace> read_place(const Manifest& manifest, std::uint32_t buffer, std::uint64_t word) {
  const ResidencyWord said = ResidencyWord::unpack(word);
  const auto refuse = [&](const std::string& what) {
    return fail(Errc::bad_region, subject(manifest, buffer) + ": " + what);
  };
  switch (said.state) {
    case ResidencyState::unsaid:
      return refuse("the engine does not say whether it is resident; register the module again");
    case ResidencyState::absent:
      return LayerPlace{};
    case ResidencyState::resident:
      break;
    default:
      return refuse("the engine says nonsense about its residency");
  }
  const std::uint64_t bytes = manifest.layer_buffers()[buffer];
  if (said.region >= manifest.regions().size() || !manifest.regions()[said.region].pool) {
    return refuse("the engine says that it is resident in region " + std::to_string(said.region) +
                  ", which is no pool");
  }
  const std::uint64_t pool_bytes = manifest.regions()[said.region].bytes;
  if (bytes > pool_bytes || said.offset > pool_bytes - bytes) {
    return refuse("the engine says that its " + std::to_string(bytes) + " bytes are at offset " +
                  std::to_string(said.offset) + " of region " + std::to_string(said.region) +
                  ", which has " + std::to_string(pool_bytes) + " bytes");
  }
  if (said.offset % ResidencyWord::kAlignBytes != 0) {
    return refuse("the engine says that it is at offset " + std::to_string(said.offset) +
                  ", which is no multiple of " + std::to_string(ResidencyWord::kAlignBytes));
  }
  return LayerPlace{true, said.region, said.offset};
}

LayerPlaces::LayerPlaces(const Manifest& manifest) : places_(manifest.layer_buffers().size()) {
  resident_.reserve(places_.size());
}

Result<void> LayerPlaces::read(const Manifest& manifest, const std::uint64_t* words) {
  resident_.clear();
  for (std::uint32_t i = 0; i < places_.size(); ++i) {
    REFIT_TRY_ASSIGN(places_[i], read_place(manifest, i, words[i]));
    if (places_[i].resident && manifest.layer_buffers()[i] > 0) resident_.push_back(i);
  }
  std::sort(resident_.begin(), resident_.end(), [this](std::uint32_t a, std::uint32_t b) {
    return std::tie(places_[a].region, places_[a].offset) <
           std::tie(places_[b].region, places_[b].offset);
  });
  for (std::size_t i = 1; i < resident_.size(); ++i) {
    const std::uint32_t below = resident_[i - 1];
    const LayerPlace& place = places_[below];
    const LayerPlace& next = places_[resident_[i]];
    if (place.region != next.region ||
        place.offset + manifest.layer_buffers()[below] <= next.offset) {
      continue;
    }
    return fail(Errc::bad_region, subject(manifest, below) + " and layer buffer " +
                                      std::to_string(resident_[i]) +
                                      ": the engine says that they are resident in the same bytes");
  }
  return {};
}

}  // namespace refit::daemon
