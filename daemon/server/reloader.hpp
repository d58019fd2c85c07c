// Reloader: reads the configuration again while the daemon serves, on SIGHUP or when an operator
// asks.
//
// The loop thread; the file is read and names are looked up on the background pool, since both may
// block. One reload at a time: who asks during one is answered by the next, so that every answer is
// about a file read after the question.
#pragma once

#include <functional>
#include <vector>

#include "config/configuration.hpp"
#include "server/background_pool.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"

namespace refit::daemon {

class Reloader {
 public:
  Reloader(ConfigurationSource source, Configuration& running, Registry& registry, Replies& replies,
           BackgroundPool& background);
  ~Reloader();

  /// Called after `running` was changed.
  std::function<void()> changed;

  /// SIGHUP.
  void begin();
  /// Root and the daemon's own uid may ask.
  void begin(Session& asker, std::uint64_t request_id);

 private:
  class Job;
  struct Asker {
    std::uint64_t session_id;
    std::uint64_t request_id;
  };
  void start();
  void finish(Result<Configuration> loaded);
  void answer(const Result<Changes>& outcome);

  ConfigurationSource source_;
  Configuration& running_;
  Registry& registry_;
  Replies& replies_;
  BackgroundPool& background_;
  bool reading_ = false;
  bool again_ = false;
  std::vector<Asker> asked_;    ///< of the reload that runs
  std::vector<Asker> waiting_;  ///< of the next one
};

}  // namespace refit::daemon
