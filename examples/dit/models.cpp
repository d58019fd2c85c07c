// The table of sizes. See models.hpp.

#include "dit/models.hpp"

#include <algorithm>
#include <map>

namespace dit {

std::optional<Config> config_of(const std::string& model) {
  static const std::map<std::string, Config> kConfigs = {{"tiny", {2, 64, 4}},
                                                         {"S", {12, 384, 6}},
                                                         {"B", {12, 768, 12}},
                                                         {"L", {24, 1024, 16}},
                                                         {"XL", {28, 1152, 16}}};
  const auto known = kConfigs.find(model);
  if (known == kConfigs.end()) return std::nullopt;
  return known->second;
}

double learning_rate_of(const Config& config) {
  constexpr double kRate = 1e-3;  // found for S; wider and deeper models diverge with it
  const double width = static_cast<double>(config.hidden) / 384;
  const double depth = static_cast<double>(config.depth) / 12;
  return kRate / std::max(1.0, width * depth);
}

std::vector<std::string> model_names() { return {"tiny", "S", "B", "L", "XL"}; }

}  // namespace dit
