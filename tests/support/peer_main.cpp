// peer: a trainer or an engine that tests can kill, stop and run as another user.
//
// Reads one command a line and answers each with one line; support/client_process.hpp speaks to it.
// One thread. Commands:
//   setuid UID | trainer NAME SOCKET | engine NAME SOCKET
//   module NAME SEED | large NAME SEED: registers small_tensors() or large_tensors()
//   refit ENGINE MODULE MS | refit2 ENGINE ENGINE MODULE MS | poll MS | wait MS
//   state MODULE | exit

#include <unistd.h>

#include <cstdio>
#include <iostream>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "refit/engine.hpp"
#include "refit/trainer.hpp"
#include "support/shapes.hpp"

namespace {

using namespace refit;        // NOLINT: a small program about this one namespace
using namespace refit::test;  // NOLINT

std::string told(const Error& error) {
  std::string text = error.to_string();
  for (char& c : text) c = c == '\n' ? ' ' : c;
  return "error " + text;
}

template <typename T>
std::string told(const Result<T>& result) {
  return result ? "ok" : told(result.error());
}

class Peer {
 public:
  std::string act(std::istringstream& words) {
    std::string command;
    words >> command;
    if (command == "setuid") return become(words);
    if (command == "trainer" || command == "engine") {
      const std::string name = next(words);
      const ConnectOptions options{next(words), Waiting::adaptive};
      if (command == "trainer") return keep(Trainer::connect(name, options, soon()), trainer_);
      return keep(Engine::connect(name, options, soon()), engine_);
    }
    if (command == "module") return register_module(words, small_tensors());
    if (command == "large") return register_module(words, large_tensors());
    if (command == "refit" && trainer_) return refit(words, 1);
    if (command == "refit2" && trainer_) return refit(words, 2);
    if (command == "poll" && engine_) return told_event(engine_->poll(within(words)));
    if (command == "wait" && engine_) return told_event(engine_->wait(within(words)));
    if (command == "state" && engine_) {
      const std::string module = next(words);
      return "ok " + std::string(module_state_name(engine_->state(module))) + " " +
             std::to_string(engine_->version(module)) + (engine_->step_allowed() ? " go" : " stay");
    }
    return "error unknown command";
  }

 private:
  static Deadline soon() { return Deadline::in(std::chrono::seconds(20)); }
  static std::string next(std::istringstream& words) {
    std::string word;
    words >> word;
    return word;
  }
  static Deadline within(std::istringstream& words) {
    int ms = 0;
    words >> ms;
    return Deadline::in(std::chrono::milliseconds(ms));
  }
  template <typename T>
  std::string keep(Result<T> made, std::optional<T>& place) {
    if (!made) return told(made.error());
    place.emplace(std::move(*made));
    return "ok";
  }

  std::string become(std::istringstream& words) {
    uid_t uid = 0;
    words >> uid;
    return ::setgid(uid) == 0 && ::setuid(uid) == 0 ? "ok" : "error setuid failed";
  }

  std::string register_module(std::istringstream& words, const std::vector<TensorShape>& tensors) {
    const std::string name = next(words);
    std::uint64_t seed = 0;
    words >> seed;
    auto model = std::make_unique<Model>(name, tensors);
    model->fill(seed);
    auto registered = trainer_ ? trainer_->register_module(model->spec(), soon())
                               : engine_->register_module(model->spec(), soon());
    models_.push_back(std::move(model));
    return told(registered);
  }

  std::string refit(std::istringstream& words, std::size_t engines) {
    std::vector<RefitTarget> targets(engines);
    for (RefitTarget& target : targets) target.engine = next(words);
    const std::string module = next(words);
    for (RefitTarget& target : targets) target.module = module;
    const auto report = trainer_->refit_all(targets, within(words));
    return report ? "ok " + std::to_string(report->version) : told(report.error());
  }

  static std::string told_event(const Result<std::optional<GateEvent>>& event) {
    if (!event) return told(event.error());
    return *event ? "ok event " + std::to_string((*event)->modules.front().version) : "ok none";
  }

  std::optional<Trainer> trainer_;
  std::optional<Engine> engine_;
  std::vector<std::unique_ptr<Model>> models_;
};

}  // namespace

int main() {
  Peer peer;
  std::cout << "ok ready" << std::endl;
  for (std::string line; std::getline(std::cin, line) && line != "exit";) {
    std::istringstream words(line);
    std::cout << peer.act(words) << std::endl;
  }
  return 0;
}
