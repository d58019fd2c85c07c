// What the daemon says of itself: status, tensor lists and metrics as wire messages.
#pragma once

#include "config/settings.hpp"
#include "server/registry.hpp"
#include "server/replies.hpp"
#include "server/statistics.hpp"

namespace refit::daemon {

/// What the whole daemon adds to a status.
struct DaemonFacts {
  Clock::time_point now;
  std::uint64_t uptime_us = 0;
  std::uint64_t refits = 0;
  unsigned copy_threads = 0;
  const char* copy_kernel = "";
  std::string socket;
  Waiting waiting = Waiting::adaptive;
  bool draining = false;
  Limits limits;
};

void reply_status(Replies& replies, Session& asker, std::uint64_t request_id,
                  const Registry& registry, const DaemonFacts& facts);
void reply_tensors(Replies& replies, Session& asker, std::uint64_t request_id,
                   const Registry& registry, const wire::TensorsQuery& query);
void reply_metrics(Replies& replies, Session& asker, std::uint64_t request_id,
                   const Registry& registry, const DaemonFacts& facts,
                   const Statistics& statistics);

}  // namespace refit::daemon
