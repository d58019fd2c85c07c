// The bench's own trainer and engine processes: servers of commands that the orchestrator sends
// over a channel.
//
// Each is one thread in a process of its own. They use the public client library as any user would,
// time its calls by themselves, and return samples. They know nothing of the daemon but its socket
// path.
#pragma once

#include <memory>
#include <string>

#include "channel.hpp"
#include "model.hpp"
#include "refit/memory.hpp"
#include "refit/module.hpp"
#include "weights.hpp"

namespace refit::bench {

inline constexpr const char* kEngineName = "bench";
inline constexpr const char* kModuleName = "transformer";
/// In the names of all tensor memory of the bench, so that /proc/PID/smaps of the daemon can be
/// told apart.
inline constexpr const char* kTensorLabel = "bench-tensors";
/// Long enough for any single call at any size; a call that needs more is reported, not waited for.
inline constexpr auto kCallTimeout = std::chrono::seconds(120);

/// What a role holds between commands: a model in memory of its own.
struct Holding {
  Model model;
  std::shared_ptr<SharedMemory> memory;
  Arena source;  ///< set in a trainer
  Arena target;  ///< set in an engine, and in a trainer that maps the engine's memory
};

/// A command's "manifest", "scale" and "cut" as a model.
[[nodiscard]] Result<Model> model_of(const nlohmann::json& command);
/// How `model` lies in memory: packed at full size, apart when cut to 64 bytes.
[[nodiscard]] Layout layout_of(const std::vector<ModelTensor>& tensors, bool cut);
/// All tensors of `tensors` in `memory` as a module to register.
[[nodiscard]] Result<ModuleSpec> module_of(const std::string& name, const Model& model,
                                           const std::vector<ModelTensor>& tensors,
                                           const Layout& layout,
                                           const std::shared_ptr<SharedMemory>& memory);
[[nodiscard]] Result<Waiting> waiting_of(const nlohmann::json& command);
/// The answer to a command that failed, with the first details: a whole model can be wrong tensor
/// by tensor.
[[nodiscard]] nlohmann::json error_reply(Error error);

/// The body of `refit_bench --role trainer` and `--role engine`. Returns the exit status.
int run_trainer(Channel channel);
int run_engine(Channel channel);

}  // namespace refit::bench
