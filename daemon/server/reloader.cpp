#include "server/reloader.hpp"

#include <systemd/sd-daemon.h>
#include <unistd.h>

#include <utility>

#include "log.hpp"

namespace refit::daemon {
namespace {

/// Tells systemd that a reload runs; that it is over on every way out.
class ReloadNotice {
 public:
  static void begin() {
    const auto now = std::chrono::duration_cast<std::chrono::microseconds>(
        std::chrono::steady_clock::now().time_since_epoch());
    sd_notifyf(0, "RELOADING=1\nMONOTONIC_USEC=%lld", static_cast<long long>(now.count()));
  }
  ReloadNotice() = default;
  ReloadNotice(const ReloadNotice&) = delete;
  ReloadNotice& operator=(const ReloadNotice&) = delete;
  ~ReloadNotice() { sd_notify(0, "READY=1"); }
};

std::string joined(const std::vector<std::string>& keys) {
  std::string text;
  for (const std::string& key : keys) text += (text.empty() ? "" : ", ") + key;
  return text;
}

}  // namespace

class Reloader::Job final : public BackgroundJob {
 public:
  explicit Job(Reloader& owner) : BackgroundJob(1), owner_(owner) {}
  void run_part(std::size_t) override { loaded_ = load(owner_.source_); }
  void finished() override { owner_.finish(std::move(loaded_)); }

 private:
  Reloader& owner_;
  Result<Configuration> loaded_;
};

Reloader::Reloader(ConfigurationSource source, Configuration& running, Registry& registry,
                   Replies& replies, BackgroundPool& background)
    : source_(std::move(source)),
      running_(running),
      registry_(registry),
      replies_(replies),
      background_(background) {}

Reloader::~Reloader() = default;

void Reloader::begin() {
  again_ = true;
  if (!reading_) start();
}

void Reloader::begin(Session& asker, std::uint64_t request_id) {
  if (asker.peer.uid != 0 && asker.peer.uid != ::geteuid()) {
    return replies_.send_error(asker, request_id,
                               {Errc::permission,
                                0,
                                "uid " + std::to_string(asker.peer.uid) +
                                    " may not reload: only root and the daemon's own uid (" +
                                    std::to_string(::geteuid()) + ") may",
                                {}});
  }
  waiting_.push_back({asker.id, request_id});
  begin();
}

void Reloader::start() {
  again_ = false;
  reading_ = true;
  asked_ = std::exchange(waiting_, {});
  ReloadNotice::begin();
  background_.submit(std::make_unique<Job>(*this), BackgroundPool::Priority::first);
}

void Reloader::finish(Result<Configuration> loaded) {
  reading_ = false;
  {
    const ReloadNotice over;
    Result<Changes> outcome;
    if (loaded) {
      outcome = take_over(running_, std::move(*loaded));
      if (changed) changed();
      std::string text = "reloaded " + running_.file + "; changed: " +
                         (outcome->changed.empty() ? "nothing" : joined(outcome->changed));
      if (!outcome->needs_restart.empty())
        text += "; differs and needs a restart: " + joined(outcome->needs_restart);
      log(LogEvent::reloaded, text);
    } else {
      outcome = Unexpected(std::move(loaded).error());
      log(LogEvent::reload_refused,
          "not reloaded, the old configuration holds: " + outcome.error().to_string(),
          {.errc = outcome.error().code});
    }
    answer(outcome);
  }
  if (again_) start();
}

void Reloader::answer(const Result<Changes>& outcome) {
  for (const Asker& asker : std::exchange(asked_, {})) {
    const auto session = registry_.find(asker.session_id);
    if (session == nullptr) continue;
    if (!outcome) {
      replies_.send_error(*session, asker.request_id, outcome.error());
      continue;
    }
    auto& fbb = replies_.builder();
    const auto file = fbb.CreateString(running_.file);
    const auto changed_keys = fbb.CreateVectorOfStrings(outcome->changed);
    const auto restart_keys = fbb.CreateVectorOfStrings(outcome->needs_restart);
    replies_.send(*session, asker.request_id, wire::Body::Reloaded,
                  wire::CreateReloaded(fbb, file, changed_keys, restart_keys).Union());
  }
}

}  // namespace refit::daemon
