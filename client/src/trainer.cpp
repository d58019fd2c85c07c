#include "refit/trainer.hpp"

#include <map>

#include "bound_engines.hpp"
#include "requests.hpp"

namespace refit {

class Trainer::Impl {
 public:
  explicit Impl(std::unique_ptr<Session> session) : session_(std::move(session)) {}

  Result<void> register_module(const ModuleSpec& module, Deadline deadline) {
    REFIT_TRY(refit::register_module(*session_, module, {}, deadline));
    modules_.insert_or_assign(module.name(), module);
    return {};
  }

  Result<void> unregister_module(const std::string& module, Deadline deadline) {
    REFIT_TRY(refit::unregister_module(*session_, module, deadline));
    modules_.erase(module);
    return {};
  }

  Result<RefitReport> refit(const RefitTarget* targets, std::size_t count, Deadline deadline,
                            const RefitOptions& options) {
    RefitReport report;
    report.transaction = options.transaction.is_zero() ? next_transaction() : options.transaction;
    auto& fbb = session_->builder();
    target_offsets_.clear();
    for (std::size_t i = 0; i < count; ++i) target_offsets_.push_back(encode(fbb, targets[i]));
    const auto list = fbb.CreateVector(target_offsets_);
    const auto id = to_wire(report.transaction);
    fbb.Finish(wire::CreateRefit(fbb, &id, list, wire::Staging::direct, options.reset_caches,
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

  Session& session() noexcept { return *session_; }

 private:
  static constexpr float kBriefTotalUs = 70;

  static flatbuffers::Offset<wire::Target> encode(flatbuffers::FlatBufferBuilder& fbb,
                                                  const RefitTarget& target) {
    const auto engine = fbb.CreateString(target.engine);
    const auto module = fbb.CreateString(target.module);
    const auto source = fbb.CreateString(target.source.empty() ? target.module : target.source);
    flatbuffers::Offset<flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>> selection;
    if (!target.selection.empty()) selection = fbb.CreateVectorOfStrings(target.selection);
    return wire::CreateTarget(fbb, engine, module, source, selection, target.allow_unmatched);
  }

  /// Random where it must be unique across processes, counted where it must be cheap.
  TransactionId next_transaction() noexcept {
    ++transaction_.low;
    return transaction_;
  }

  std::unique_ptr<Session> session_;
  std::map<std::string, ModuleSpec> modules_;  ///< holds the registered memory
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
  REFIT_TRY_ASSIGN(auto session, Session::connect(Role::trainer, name, options, deadline));
  return Trainer(std::make_unique<Impl>(std::move(session)));
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
  return refit::check(impl_->session(), request, deadline);
}
Result<DigestReport> Trainer::digest(const DigestRequest& request, Deadline deadline) {
  return refit::digest(impl_->session(), request, deadline);
}
Result<void> Trainer::ping(Deadline deadline) {
  Session& session = impl_->session();
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateStatusQuery(fbb));
  REFIT_TRY(session.call(wire::Opcode::ping, deadline, Expect::brief));
  return {};
}

}  // namespace refit
