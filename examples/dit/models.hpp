// The sizes of the model, apart from it: programs can list and check them without torch's headers.
//
// Plain values, any thread.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace dit {

struct Config {
  std::int64_t depth = 12;
  std::int64_t hidden = 384;
  std::int64_t heads = 6;
  std::int64_t patch = 2;
  std::int64_t channels = 4;  ///< of a latent
  std::int64_t side = 8;      ///< of a square latent, in latent pixels
  std::int64_t classes = 10;
};

/// "S", "B", "L" and "XL" of the paper, and "tiny" for tests; nothing for another name.
std::optional<Config> config_of(const std::string& model);
/// A rate at which AdamW learns from the first step on, without warm-up: it falls with the size.
double learning_rate_of(const Config& config);
/// The names that config_of knows, smallest first.
std::vector<std::string> model_names();

}  // namespace dit
