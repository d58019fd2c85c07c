// The bench's own trainer and engine processes: servers of commands that the orchestrator sends
// over a channel.
//
// Each is one thread in a process of its own. They use the public client library as any user would,
// time its calls by themselves, and return samples. They know nothing of the daemon but its socket
// path.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "channel.hpp"
#include "model.hpp"
#include "refit/connection.hpp"
#include "refit/module.hpp"
#include "storage.hpp"

namespace refit::bench {

inline constexpr const char* kEngineName = "bench";
inline constexpr const char* kModuleName = "transformer";
/// Long enough for any single call at any size; a call that needs more is reported, not waited for.
inline constexpr auto kCallTimeout = std::chrono::seconds(120);

/// How `tensors` lie in memory: packed at full size, apart when cut to 64 bytes.
[[nodiscard]] Layout layout_of(const std::vector<ModelTensor>& tensors, bool cut);

/// What both roles are: a model in memory, a client on a daemon, and answers to commands.
class Role {
 public:
  virtual ~Role() = default;
  Role(const Role&) = delete;
  Role& operator=(const Role&) = delete;

 protected:
  struct Reply {
    nlohmann::json body;
    int fd = -1;
  };
  using Answer = std::function<Result<void>(Message& command, Reply& reply)>;

  /// @param filled_with  the seed of the bytes that its own tensors hold at first.
  Role(Channel channel, std::uint64_t filled_with);

  void on(const std::string& command, Answer answer) { answers_[command] = std::move(answer); }
  /// Answers a command if one comes within `timeout`. False once the process shall end.
  [[nodiscard]] bool serve(std::chrono::milliseconds timeout);
  /// What went wrong between two commands: the next answers say it.
  void report(const Error& error) { trouble_ = error.to_string(); }
  /// 0 if it was told to end.
  [[nodiscard]] int status() const noexcept { return quit_ ? 0 : 1; }

  [[nodiscard]] const Model& model() const noexcept { return model_; }
  [[nodiscard]] Storage& own() noexcept { return *own_; }
  [[nodiscard]] MemoryKind& kind() noexcept { return *kind_; }
  [[nodiscard]] Side side_of(const std::vector<ModelTensor>& tensors) const;

 private:
  [[nodiscard]] virtual Result<std::unique_ptr<Storage>> allocate() = 0;
  [[nodiscard]] virtual Result<ModuleSpec> module_in(const Storage& storage,
                                                     const std::string& name) = 0;
  [[nodiscard]] virtual Result<void> connect(const ConnectOptions& options) = 0;
  virtual void disconnect() = 0;
  [[nodiscard]] virtual Result<void> register_module(const ModuleSpec& module) = 0;
  [[nodiscard]] virtual Result<void> unregister_module(const std::string& module) = 0;

  Result<void> handle(Message& command, Reply& reply);
  Result<void> load(const nlohmann::json& command, Reply& reply);
  Result<double> timed_register(const ModuleSpec& module);
  Result<void> register_often(int times, nlohmann::json& reply);

  Channel channel_;
  std::uint64_t filled_with_;
  std::map<std::string, Answer> answers_;
  std::string trouble_;
  bool quit_ = false;
  Model model_;
  bool cut_ = false;
  std::unique_ptr<MemoryKind> kind_;
  std::unique_ptr<Storage> own_;
};

/// The body of `refit_bench --role trainer` and `--role engine`. Returns the exit status.
int run_trainer(Channel channel);
int run_engine(Channel channel);

}  // namespace refit::bench
