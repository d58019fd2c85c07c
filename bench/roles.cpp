// What both roles of the bench share. See roles.hpp.
//
// One thread. Must not know which role calls.
#include "roles.hpp"

#include <algorithm>

#include "stats.hpp"

namespace refit::bench {
namespace {

Result<Waiting> waiting_of(const nlohmann::json& command) {
  const std::string name = command.at("waiting").get<std::string>();
  for (const Waiting waiting : {Waiting::off, Waiting::adaptive, Waiting::always}) {
    if (waiting_name(waiting) == name) return waiting;
  }
  return fail(Errc::bad_argument, "no waiting mode is called '" + name + "'");
}

/// With the first details only: a whole model can be wrong tensor by tensor.
nlohmann::json error_reply(Error error) {
  constexpr std::size_t kDetailsShown = 5;
  const std::size_t more = error.details.size() - std::min(error.details.size(), kDetailsShown);
  error.details.resize(error.details.size() - more);
  if (more > 0) error.details.push_back("and " + std::to_string(more) + " more");
  return {{"error", error.to_string()}, {"code", error.code}};
}

}  // namespace

Layout layout_of(const std::vector<ModelTensor>& tensors, bool cut) {
  return lay_out(tensors, cut ? kApartAlignBytes : kPackedAlignBytes);
}

Role::Role(Channel channel, std::uint64_t filled_with)
    : channel_(std::move(channel)), filled_with_(filled_with) {
  on("allocate", [this](Message& command, Reply& reply) { return load(command.body, reply); });
  on("connect", [this](Message& command, Reply&) -> Result<void> {
    REFIT_TRY_ASSIGN(const Waiting waiting, waiting_of(command.body));
    return connect({command.body.at("socket").get<std::string>(), waiting});
  });
  on("disconnect", [this](Message&, Reply&) -> Result<void> {
    disconnect();
    return {};
  });
  on("register", [this](Message&, Reply& reply) -> Result<void> {
    REFIT_TRY_ASSIGN(const ModuleSpec module, module_in(*own_, kModuleName));
    REFIT_TRY_ASSIGN(reply.body["seconds"], timed_register(module));
    return {};
  });
  on("register_often", [this](Message& command, Reply& reply) {
    return register_often(command.body.at("times").get<int>(), reply.body);
  });
  on("quit", [this](Message&, Reply&) -> Result<void> {
    quit_ = true;
    return {};
  });
}

bool Role::serve(std::chrono::milliseconds timeout) {
  auto message = channel_.receive(timeout);
  if (!message) return false;
  if (!*message) return true;
  Reply reply;
  auto done = handle(**message, reply);
  if (done && !trouble_.empty()) done = fail(Errc::os, "between two commands: " + trouble_);
  if (!done) reply = {error_reply(done.error()), -1};
  return channel_.send(reply.body, reply.fd).has_value() && !quit_;
}

Result<void> Role::handle(Message& command, Reply& reply) {
  const std::string name = command.body.at("command").get<std::string>();
  const auto answer = answers_.find(name);
  if (answer == answers_.end()) return fail(Errc::bad_argument, "no such command: " + name);
  return answer->second(command, reply);
}

Side Role::side_of(const std::vector<ModelTensor>& tensors) const {
  Layout layout = layout_of(tensors, cut_);
  std::vector<Extent> layers = layers_of(model_, tensors, layout);
  return {model_.dtype, tensors, std::move(layout), std::move(layers)};
}

Result<void> Role::load(const nlohmann::json& command, Reply& reply) {
  REFIT_TRY_ASSIGN(model_, load_model(command.at("manifest").get<std::string>(),
                                      command.at("scale").get<double>()));
  cut_ = command.at("cut").get<bool>();
  if (cut_) {
    REFIT_TRY_ASSIGN(model_, cut_to_64_bytes(model_));
  }
  REFIT_TRY_ASSIGN(kind_, make_memory_kind(command.at("memory").get<std::string>()));
  REFIT_TRY_ASSIGN(own_, allocate());
  fill(own_->view().data, own_->view().layout.bytes, filled_with_);
  REFIT_TRY(own_->write());
  REFIT_TRY_ASSIGN(Storage::Address address, own_->share());
  reply = {{{"address", std::move(address.how)}}, address.fd};
  return {};
}

Result<double> Role::timed_register(const ModuleSpec& module) {
  Result<void> registered;
  const double seconds = seconds_of([&] { registered = register_module(module); });
  if (!registered) return Unexpected(std::move(registered).error());
  return seconds;
}

/// In memory of their own: no two modules of an engine may share any.
Result<void> Role::register_often(int times, nlohmann::json& reply) {
  REFIT_TRY_ASSIGN(const std::unique_ptr<Storage> storage, allocate());
  Samples samples;
  for (int i = 0; i < times; ++i) {
    const std::string name = "again-" + std::to_string(i);
    REFIT_TRY_ASSIGN(const ModuleSpec module, module_in(*storage, name));
    REFIT_TRY_ASSIGN(const double seconds, timed_register(module));
    samples.push_back(seconds);
    REFIT_TRY(unregister_module(name));
  }
  reply["seconds"] = samples;
  return {};
}

}  // namespace refit::bench
