// What both roles of the bench share. See roles.hpp.
//
// One thread. Must not know which role calls.
#include "roles.hpp"

#include <algorithm>

namespace refit::bench {

Result<Model> model_of(const nlohmann::json& command) {
  REFIT_TRY_ASSIGN(Model model, load_model(command.at("manifest").get<std::string>(),
                                           command.at("scale").get<double>()));
  if (!command.at("cut").get<bool>()) return model;
  return cut_to_64_bytes(model);
}

Layout layout_of(const std::vector<ModelTensor>& tensors, bool cut) {
  return lay_out(tensors, cut ? kApartAlignBytes : kPackedAlignBytes);
}

Result<ModuleSpec> module_of(const std::string& name, const Model& model,
                             const std::vector<ModelTensor>& tensors, const Layout& layout,
                             const std::shared_ptr<SharedMemory>& memory) {
  ModuleSpec module(name);
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    REFIT_TRY(module.add(tensors[i].name, model.dtype, tensors[i].shape, memory,
                         memory->data() + layout.offsets[i]));
  }
  return module;
}

Result<Waiting> waiting_of(const nlohmann::json& command) {
  const std::string name = command.at("waiting").get<std::string>();
  for (const Waiting waiting : {Waiting::off, Waiting::adaptive, Waiting::always}) {
    if (waiting_name(waiting) == name) return waiting;
  }
  return fail(Errc::bad_argument, "no waiting mode is called '" + name + "'");
}

nlohmann::json error_reply(Error error) {
  constexpr std::size_t kDetailsShown = 5;
  const std::size_t more = error.details.size() - std::min(error.details.size(), kDetailsShown);
  error.details.resize(error.details.size() - more);
  if (more > 0) error.details.push_back("and " + std::to_string(more) + " more");
  return {{"error", error.to_string()}, {"code", error.code}};
}

}  // namespace refit::bench
