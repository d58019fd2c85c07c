// Reads model manifests and derives targets from sources. See model.hpp.
//
// Pure but for one file read; any thread. The name map is applied here by RE2 as the daemon does,
// but by code of its own: a manifest whose target list disagrees with its map is found before the
// daemon sees it.
#include "model.hpp"

#include <re2/re2.h>

#include <cmath>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <unordered_map>

namespace refit::bench {
namespace {

using nlohmann::json;

std::uint64_t elements(const Dims& shape) {
  std::uint64_t count = 1;
  for (const std::uint64_t extent : shape) count *= extent;
  return count;
}

std::string text_of(const Dims& shape) {
  std::string text = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
  return text + "]";
}

struct Mapped {
  std::string target;
  std::uint32_t part = 0;
  std::uint32_t parts = 1;
};

class NameMap {
 public:
  static Result<NameMap> compile(const std::vector<NameRule>& rules) {
    NameMap map;
    for (const NameRule& rule : rules) {
      auto pattern = std::make_unique<re2::RE2>(rule.pattern, re2::RE2::Quiet);
      if (!pattern->ok()) {
        return fail(Errc::bad_argument,
                    "the name map's pattern '" + rule.pattern + "' is wrong: " + pattern->error());
      }
      map.rules_.push_back({std::move(pattern), rule});
    }
    return map;
  }

  [[nodiscard]] Mapped apply(const std::string& name) const {
    for (const auto& [pattern, rule] : rules_) {
      std::vector<re2::StringPiece> groups(
          static_cast<std::size_t>(pattern->NumberOfCapturingGroups()) + 1);
      if (!pattern->Match(name, 0, name.size(), re2::RE2::ANCHOR_BOTH, groups.data(),
                          static_cast<int>(groups.size()))) {
        continue;
      }
      std::string target;
      pattern->Rewrite(&target, rule.target, groups.data(), static_cast<int>(groups.size()));
      return {target, rule.part, rule.parts};
    }
    return {name, 0, 1};
  }

 private:
  struct Rule {
    std::unique_ptr<re2::RE2> pattern;
    NameRule rule;
  };
  std::vector<Rule> rules_;
};

Result<std::vector<ModelTensor>> read_tensors(const json& list, const std::string& where) {
  std::vector<ModelTensor> tensors;
  for (const json& entry : list) {
    if (!entry.is_array() || entry.size() != 2 || !entry[0].is_string() || !entry[1].is_array()) {
      return fail(Errc::bad_argument, where +
                                          ": every entry is [\"name\", [dims...]]; this is not: " +
                                          entry.dump().substr(0, 100));
    }
    ModelTensor tensor{entry[0].get<std::string>(), {}, 0};
    for (const json& extent : entry[1]) {
      if (!extent.is_number_unsigned()) {
        return fail(Errc::bad_argument,
                    where + ": dimensions of '" + tensor.name + "' are not whole numbers");
      }
      tensor.shape.push_back(extent.get<std::uint64_t>());
    }
    tensors.push_back(std::move(tensor));
  }
  return tensors;
}

/// Fills in shapes of targets, placements and bytes from the source. Targets keep their order.
Result<void> derive(Model& model, const NameMap& map) {
  const std::uint64_t element = element_bytes(model.dtype);
  std::unordered_map<std::string, std::uint32_t> index;
  for (std::uint32_t i = 0; i < model.target.size(); ++i) {
    model.target[i].shape.clear();
    index.emplace(model.target[i].name, i);
  }
  std::vector<std::vector<std::pair<std::uint32_t, std::uint32_t>>> parts(model.target.size());
  std::vector<std::uint32_t> wanted(model.target.size(), 0);
  model.bytes = 0;
  for (std::uint32_t i = 0; i < model.source.size(); ++i) {
    ModelTensor& source = model.source[i];
    source.bytes = elements(source.shape) * element;
    model.bytes += source.bytes;
    const Mapped mapped = map.apply(source.name);
    const auto found = index.find(mapped.target);
    if (found == index.end()) {
      return fail(Errc::bad_argument, "source '" + source.name + "' maps to '" + mapped.target +
                                          "', which the target list lacks");
    }
    parts[found->second].emplace_back(mapped.part, i);
    wanted[found->second] = mapped.parts;
  }
  model.placements.assign(model.source.size(), {});
  for (std::uint32_t t = 0; t < model.target.size(); ++t) {
    ModelTensor& target = model.target[t];
    std::sort(parts[t].begin(), parts[t].end());
    if (parts[t].empty() || parts[t].size() != wanted[t]) {
      return fail(Errc::bad_argument,
                  "target '" + target.name + "' has " + std::to_string(parts[t].size()) +
                      " sources, its name map wants " + std::to_string(wanted[t]));
    }
    target.bytes = 0;
    for (std::uint32_t k = 0; k < parts[t].size(); ++k) {
      const auto [part, s] = parts[t][k];
      const ModelTensor& source = model.source[s];
      if (part != k) {
        return fail(Errc::bad_argument,
                    "target '" + target.name + "' has no source for part " + std::to_string(k));
      }
      if (k == 0) {
        target.shape = source.shape;
      } else {
        Dims rest = source.shape;
        if (rest.empty() || rest.size() != target.shape.size() ||
            !std::equal(rest.begin() + 1, rest.end(), target.shape.begin() + 1)) {
          return fail(Errc::bad_argument, "parts of target '" + target.name + "' do not fit: '" +
                                              source.name + "' is " + text_of(rest));
        }
        target.shape[0] += rest[0];
      }
      model.placements[s] = {t, target.bytes};
      target.bytes += source.bytes;
    }
  }
  return {};
}

Result<Model> parse(const json& file) {
  for (const char* key : {"model", "dtype", "source", "target"}) {
    if (!file.contains(key))
      return fail(Errc::bad_argument, std::string("the key '") + key + "' is missing");
  }
  Model model;
  model.name = file["model"].get<std::string>();
  const std::string dtype = file["dtype"].get<std::string>();
  const auto parsed = parse_dtype(dtype);
  if (!parsed)
    return fail(Errc::bad_argument, "dtype '" + dtype + "' is none of PyTorch's that refit knows");
  model.dtype = *parsed;
  if (file.contains("offload"))
    model.layer_lists = file["offload"].value("layer_lists", std::vector<std::string>());
  if (file.contains("name_map")) {
    for (const json& rule : file["name_map"]) {
      model.rules.push_back({rule.at("pattern").get<std::string>(),
                             rule.at("target").get<std::string>(), rule.value("part", 0U),
                             rule.value("parts", 1U)});
    }
  }
  REFIT_TRY_ASSIGN(model.source, read_tensors(file["source"], "source"));
  if (model.source.empty()) return fail(Errc::bad_argument, "the source list is empty");
  if (file["target"].is_string()) {
    model.target = model.source;
  } else {
    REFIT_TRY_ASSIGN(model.target, read_tensors(file["target"], "target"));
  }
  return model;
}

}  // namespace

Result<Model> load_model(const std::string& path, double scale) {
  if (!(scale > 0 && scale <= 16))
    return fail(Errc::bad_argument, "--scale must be above 0 and at most 16");
  std::ifstream stream(path);
  if (!stream) {
    return fail(Errc::bad_argument, "cannot open the manifest '" + path +
                                        "'; those of this project are in bench/manifests/");
  }
  const json file = json::parse(stream, nullptr, false);
  if (file.is_discarded()) return fail(Errc::bad_argument, "'" + path + "' is not JSON");
  const auto prefixed = [&](Error error) {
    error.message = path + ": " + error.message;
    return Unexpected(std::move(error));
  };
  auto model = parse(file);
  if (!model) return prefixed(std::move(model).error());
  auto map = NameMap::compile(model->rules);
  if (!map) return prefixed(std::move(map).error());

  const std::vector<ModelTensor> stated = model->target;
  if (auto derived = derive(*model, *map); !derived) return prefixed(std::move(derived).error());
  for (std::size_t i = 0; i < stated.size(); ++i) {
    if (stated[i].shape != model->target[i].shape) {
      return fail(Errc::bad_argument, path + ": target '" + stated[i].name + "' is " +
                                          text_of(stated[i].shape) + ", but its sources make " +
                                          text_of(model->target[i].shape));
    }
  }
  if (scale != 1) {
    for (ModelTensor& tensor : model->source) {
      for (std::uint64_t& extent : tensor.shape) {
        extent = static_cast<std::uint64_t>(
            std::max(1.0, std::round(static_cast<double>(extent) * scale)));
      }
    }
    if (auto derived = derive(*model, *map); !derived) return prefixed(std::move(derived).error());
  }
  return model;
}

Result<Model> cut_to_64_bytes(const Model& model) {
  Model cut = model;
  for (ModelTensor& tensor : cut.source) tensor.shape = {64 / element_bytes(model.dtype)};
  REFIT_TRY_ASSIGN(const NameMap map, NameMap::compile(model.rules));
  REFIT_TRY(derive(cut, map));
  return cut;
}

Layout lay_out(const std::vector<ModelTensor>& tensors, std::uint64_t align_bytes) {
  Layout layout;
  for (const ModelTensor& tensor : tensors) {
    layout.offsets.push_back(layout.bytes);
    layout.bytes += rounded_to(tensor.bytes, align_bytes);
  }
  return layout;
}

std::vector<Extent> layers_of(const Model& model, const std::vector<ModelTensor>& tensors,
                              const Layout& layout) {
  /// "blocks.3." of "blocks.3.attn.weight"; empty if the tensor belongs to no layer.
  const auto layer_of = [&](const std::string& tensor) -> std::string {
    for (const std::string& list : model.layer_lists) {
      if (tensor.rfind(list + ".", 0) == 0)
        return tensor.substr(0, tensor.find('.', list.size() + 1));
    }
    return "";
  };
  std::vector<Extent> layers;
  std::string last;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::string layer = layer_of(tensors[i].name);
    if (!layer.empty()) {
      if (layer != last) layers.push_back({layout.offsets[i], 0});
      layers.back().bytes = layout.offsets[i] + tensors[i].bytes - layers.back().offset;
    }
    last = layer;
  }
  return layers;
}

}  // namespace refit::bench
