#include "refit/trainer.hpp"

#include <algorithm>
#include <map>

#include "bound_engines.hpp"
#include "fence.hpp"
#include "other_daemon.hpp"
#include "reconnect.hpp"
#include "requests.hpp"

namespace refit {

namespace {

/// Which engine's module a call is about.
struct Name {
  const std::string* engine;
  const std::string* module;
  const std::string* source;  ///< null where the call needs none
};

}  // namespace

class Trainer::Impl {
 public:
  using Clock = Deadline::Clock;

  Impl(std::unique_ptr<Session> session, const std::string& name, const ConnectOptions& options)
      : reconnects_(options.reconnect),
        socket_path_(options.socket_path),
        session_(std::move(session)),
        back_(Role::trainer, name, options) {}

  Result<void> register_module(const ModuleSpec& module, Deadline deadline) {
    return calling(deadline, {}, [&]() -> Result<void> {
      REFIT_TRY(refit::register_module(*session_, module, {}, deadline));
      modules_.insert_or_assign(module.name(), module);
      return {};
    });
  }

  Result<void> unregister_module(const std::string& module, Deadline deadline) {
    return calling(deadline, {}, [&]() -> Result<void> {
      REFIT_TRY(refit::unregister_module(*session_, module, deadline));
      modules_.erase(module);
      return {};
    });
  }

  Result<RefitReport> refit(const RefitTarget* targets, std::size_t count, Deadline deadline,
                            const RefitOptions& options) {
    const TransactionId id =
        options.transaction.is_zero() ? next_transaction() : options.transaction;
    names_.clear();
    for (std::size_t i = 0; i < count; ++i) names_.push_back(name_of(targets[i]));
    // The same id each time: what a daemon that died had committed is not written twice, and what
    // it was writing is made whole.
    return calling(deadline, names_,
                   [&] { return refit_once(targets, count, deadline, id, options.reset_caches); });
  }

  Result<CheckReport> check(const CheckRequest& request, Deadline deadline) {
    names_.assign(1, {&request.engine, &request.module, nullptr});
    return calling(deadline, names_, [&] { return refit::check(*session_, request, deadline); });
  }

  Result<DigestReport> digest(const DigestRequest& request, Deadline deadline) {
    names_.assign(1, {&request.engine, &request.module, nullptr});
    return calling(deadline, names_, [&] { return refit::digest(*session_, request, deadline); });
  }

  Result<void> ping(Deadline deadline) {
    return calling(deadline, {}, [&]() -> Result<void> {
      auto& fbb = session_->builder();
      fbb.Finish(wire::CreateStatusQuery(fbb));
      REFIT_TRY(session_->call(wire::Opcode::ping, deadline, Expect::brief));
      return {};
    });
  }

 private:
  /// A module that an engine had when this trainer last spoke of it. `awaited`: a daemon came
  /// between, and the engine comes back on its own clock.
  struct Known {
    std::string engine;
    std::string module;
    bool awaited = false;
  };
  using Names = std::vector<Name>;

  Result<RefitReport> refit_once(const RefitTarget* targets, std::size_t count, Deadline deadline,
                                 const TransactionId& transaction, bool reset_caches) {
    RefitReport report;
    report.transaction = transaction;
    for (std::size_t i = 0; i < count; ++i) {
      const std::string& source = targets[i].source.empty() ? targets[i].module : targets[i].source;
      const auto found = modules_.find(source);
      if (found != modules_.end()) REFIT_TRY(mark_end_of_work(found->second));
    }
    auto& fbb = session_->builder();
    target_offsets_.clear();
    for (std::size_t i = 0; i < count; ++i) target_offsets_.push_back(encode(fbb, targets[i]));
    const auto list = fbb.CreateVector(target_offsets_);
    const auto id = to_wire(transaction);
    fbb.Finish(wire::CreateRefit(fbb, &id, list, wire::Staging::direct, reset_caches,
                                 daemon_budget_us(deadline)));

    BoundEnginesPump pump;
    // The last refit says what this one will cost: only one of a few microseconds is worth reading
    // for.
    const Expect expect = last_total_us_ < kBriefTotalUs ? Expect::brief : Expect::long_running;
    REFIT_TRY_ASSIGN(const wire::Reply* reply,
                     session_->call(wire::Opcode::refit, deadline, expect, &pump));
    const auto* body = reply->body_as_Refitted();
    if (body == nullptr || body->phases() == nullptr)
      return fail(Errc::protocol, "the daemon's reply is not a refit report");
    report.version = body->version();
    report.bytes = body->bytes();
    report.tensors = body->tensors();
    report.guarantee = static_cast<Guarantee>(body->guarantee());
    const auto* phases = body->phases();
    report.phases = {phases->wait(), phases->gate(), phases->copy(), phases->check(),
                     phases->total()};
    report.replayed = body->replayed();
    report.device_bytes = body->device_bytes();
    last_total_us_ = report.phases.total_us;
    return report;
  }

  /// Makes `call` on a session, and again until `deadline` as long as what is missing comes back by
  /// itself: a daemon, or the engines that it was told of.
  template <typename Call>
  auto calling(Deadline deadline, const Names& names, Call&& call) -> decltype(call()) {
    Backoff backoff(kEngineLook);
    bool daemon_lost = false;
    std::string waited_for;
    for (;;) {
      if (session_ == nullptr) REFIT_TRY(come_back(deadline));
      auto outcome = call();
      if (outcome) {
        remember(names);
        return outcome;
      }
      Error& error = outcome.error();
      switch (reconnects_ ? remedy_of(error, names) : Remedy::none) {
        case Remedy::none:
          for (const Name& name : names) tell_where_to_look(error, socket_path_, *name.engine);
          if (daemon_lost) error.details.emplace_back(kLostDuringCall);
          if (error.code == Errc::deadline && !waited_for.empty())
            error.details.push_back(waited_for + "; " + kWaited);
          return outcome;
        case Remedy::another_daemon:
          daemon_lost = true;
          interrupt(names);
          session_.reset();
          start_over();
          break;
        case Remedy::its_end:
          interrupt(names);
          if (deadline.passed()) return outcome;
          session_->wait_for_end(
              Deadline::at(std::min(deadline.point(), Clock::now() + kEngineLook)));
          break;
        case Remedy::the_engine: {
          waited_for = error.message;
          const auto pause = backoff.next();
          // The last attempt has the time for an answer.
          auto until = Clock::now() + pause;
          if (until + pause > deadline.point()) until = deadline.point();
          wait_with_bound_engines(until, deadline);
          if (!deadline.passed()) break;
          for (const Name& name : names) tell_where_to_look(error, socket_path_, *name.engine);
          error.message += std::string("; ") + kWaited;
          if (daemon_lost) error.code = Errc::daemon_gone;
          return outcome;
        }
      }
    }
  }

  enum class Remedy { none, another_daemon, its_end, the_engine };

  [[nodiscard]] Remedy remedy_of(const Error& error, const Names& names) const {
    switch (error.code) {
      case Errc::daemon_gone:
        return session_->verdict() ? Remedy::none : Remedy::another_daemon;
      case Errc::shutting_down:
        return Remedy::its_end;
      case Errc::no_such_engine:
      case Errc::no_such_module:
        return awaits_any(names) ? Remedy::the_engine : Remedy::none;
      default:
        return Remedy::none;
    }
  }

  // ---- coming back

  void start_over() {
    std::vector<Reconnect::Module> modules;
    for (const auto& [name, spec] : modules_) modules.push_back({spec, {}});
    back_.start(std::move(modules));
  }

  /// A session with everything registered. Errors: daemon_gone with what it waited for at the
  /// deadline; what no waiting mends.
  Result<void> come_back(Deadline deadline) {
    for (;;) {
      auto step = back_.step();
      if (!step) {
        start_over();  // the next call tries anew
        return Unexpected(std::move(step).error());
      }
      if (*step == Reconnect::Step::done) {
        session_ = back_.take_session();
        return {};
      }
      if (deadline.passed()) {
        return fail(Errc::daemon_gone,
                    "the daemon died or closed this session, and until the "
                    "deadline no other took its place: " +
                        back_.why_not_yet());
      }
      wait_with_bound_engines(Clock::time_point::max(), deadline);
    }
  }

  /// Until something may have moved. Engines of this thread come back meanwhile: nobody else could
  /// let them.
  void wait_with_bound_engines(Clock::time_point until, Deadline deadline) {
    bool back = false;
    for (BoundEngine* engine : bound_engines()) back = engine->recover() || back;
    if (back) return;
    fds_.clear();
    if (session_ == nullptr) {
      back_.append_fds(fds_);
      until = std::min(until, back_.next_attempt());
    } else {
      fds_.push_back({session_->pidfd(), POLLIN, 0});
    }
    for (const BoundEngine* engine : bound_engines()) {
      engine->append_recovery_fds(fds_);
      until = std::min(until, engine->next_recovery());
    }
    wait_for(fds_, until, deadline);
  }

  // ---- which engines come back

  Known* find(const Name& name) {
    const auto found = std::find_if(known_.begin(), known_.end(), [&](const Known& known) {
      return known.engine == *name.engine && known.module == *name.module;
    });
    return found == known_.end() ? nullptr : &*found;
  }

  void remember(const Names& names) {
    for (const Name& name : names) {
      if (Known* known = find(name)) {
        known->awaited = false;
      } else {
        known_.push_back({*name.engine, *name.module});
      }
    }
  }

  void interrupt(const Names& names) {
    for (const Name& name : names) {
      if (find(name) == nullptr) known_.push_back({*name.engine, *name.module});
    }
    for (Known& known : known_) known.awaited = true;
  }

  /// False if a source of this trainer's own is what is missing: nobody brings that back.
  [[nodiscard]] bool awaits_any(const Names& names) const {
    bool any = false;
    for (const Name& name : names) {
      if (name.source != nullptr && modules_.count(*name.source) == 0) return false;
      any = any || std::any_of(known_.begin(), known_.end(), [&](const Known& known) {
              return known.awaited && known.engine == *name.engine && known.module == *name.module;
            });
    }
    return any;
  }

  static Name name_of(const RefitTarget& target) {
    return {&target.engine, &target.module,
            target.source.empty() ? &target.module : &target.source};
  }

  static constexpr std::chrono::milliseconds kEngineLook{50};
  static constexpr const char* kWaited = "waited for it to come back after the daemon's end";
  static constexpr const char* kLostDuringCall =
      "the daemon died during this call, so an earlier attempt may have been written; send the "
      "same "
      "transaction again";
  static constexpr float kBriefTotalUs = 70;

  static flatbuffers::Offset<wire::Target> encode(flatbuffers::FlatBufferBuilder& fbb,
                                                  const RefitTarget& target) {
    const auto engine = fbb.CreateString(target.engine);
    const auto module = fbb.CreateString(target.module);
    const auto source = fbb.CreateString(target.source.empty() ? target.module : target.source);
    flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>> selection;
    if (!target.selection.empty()) selection = fbb.CreateVectorOfStrings(target.selection);
    flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<wire::ExpectedDigest>>> expected;
    if (!target.expected.empty()) expected = expected_to_wire(fbb, target.expected);
    return wire::CreateTarget(fbb, engine, module, source, selection, target.allow_unmatched,
                              expected, static_cast<std::uint8_t>(target.expected_kind));
  }

  /// Random where it must be unique across processes, counted where it must be cheap.
  TransactionId next_transaction() noexcept {
    ++transaction_.low;
    return transaction_;
  }

  bool reconnects_;
  std::string socket_path_;
  std::unique_ptr<Session> session_;  ///< null while the daemon is gone
  Reconnect back_;
  std::map<std::string, ModuleSpec> modules_;  ///< holds the registered memory
  std::vector<Known> known_;
  Names names_;
  std::vector<pollfd> fds_;
  std::vector<flatbuffers::Offset<wire::Target>> target_offsets_;
  TransactionId transaction_ = TransactionId::random();
  float last_total_us_ = 0;
};

Trainer::Trainer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Trainer::~Trainer() = default;
Trainer::Trainer(Trainer&&) noexcept = default;
Trainer& Trainer::operator=(Trainer&&) noexcept = default;

Result<Trainer> Trainer::connect(const std::string& name, const ConnectOptions& options,
                                 Deadline deadline) {
  ConnectOptions here = options;
  if (here.socket_path.empty()) here.socket_path = default_socket_path();
  REFIT_TRY_ASSIGN(auto session, Session::connect(Role::trainer, name, here, deadline));
  return Trainer(std::make_unique<Impl>(std::move(session), name, here));
}

Result<void> Trainer::register_module(const ModuleSpec& module, Deadline deadline) {
  return impl_->register_module(module, deadline);
}
Result<void> Trainer::unregister_module(const std::string& module, Deadline deadline) {
  return impl_->unregister_module(module, deadline);
}
Result<RefitReport> Trainer::refit_all(const std::vector<RefitTarget>& targets, Deadline deadline,
                                       const RefitOptions& options) {
  return impl_->refit(targets.data(), targets.size(), deadline, options);
}
Result<RefitReport> Trainer::refit(const RefitTarget& target, Deadline deadline,
                                   const RefitOptions& options) {
  return impl_->refit(&target, 1, deadline, options);
}
Result<CheckReport> Trainer::check(const CheckRequest& request, Deadline deadline) {
  return impl_->check(request, deadline);
}
Result<DigestReport> Trainer::digest(const DigestRequest& request, Deadline deadline) {
  return impl_->digest(request, deadline);
}
Result<void> Trainer::ping(Deadline deadline) { return impl_->ping(deadline); }

}  // namespace refit
