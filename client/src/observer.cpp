#include "refit/observer.hpp"

#include <poll.h>

#include <cerrno>

#include "other_daemon.hpp"
#include "requests.hpp"

namespace refit {
namespace {

Phases phases_from_wire(const wire::Phases* phases) {
  if (phases == nullptr) return {};
  return {phases->wait(), phases->gate(), phases->copy(), phases->check(), phases->total()};
}

Dims dims_from_wire(const flatbuffers::Vector<std::uint64_t>* values) {
  return values == nullptr ? Dims{} : Dims(values->begin(), values->end());
}

// A daemon of another release may have other buckets, and never fewer counts than bounds.
PhaseHistogram histogram_from_wire(const wire::PhaseHistogram* entry, std::size_t buckets) {
  PhaseHistogram histogram;
  if (entry != nullptr) {
    histogram.sum_us = entry->sum_us();
    if (entry->counts() != nullptr)
      histogram.counts.assign(entry->counts()->begin(), entry->counts()->end());
  }
  histogram.counts.resize(buckets);
  return histogram;
}

std::vector<std::string> strings_from_wire(
    const flatbuffers::Vector<flatbuffers::Offset<flatbuffers::String>>* values) {
  std::vector<std::string> strings;
  if (values == nullptr) return strings;
  for (const auto* value : *values) strings.emplace_back(view(value));
  return strings;
}

}  // namespace

class Observer::Impl {
 public:
  Impl(std::unique_ptr<Session> opened, std::string at)
      : session(std::move(opened)), socket_path(std::move(at)) {}
  std::unique_ptr<Session> session;
  std::string socket_path;

  /// `outcome`, which may say where else `engine` is.
  template <typename T>
  Result<T> told(Result<T> outcome, const std::string& engine) const {
    if (!outcome) tell_where_to_look(outcome.error(), socket_path, engine);
    return outcome;
  }
};

Observer::Observer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Observer::~Observer() = default;
Observer::Observer(Observer&&) noexcept = default;
Observer& Observer::operator=(Observer&&) noexcept = default;

Result<Observer> Observer::connect(const std::string& name, const ConnectOptions& options,
                                   Deadline deadline) {
  ConnectOptions here = options;
  if (here.socket_path.empty()) here.socket_path = default_socket_path();
  REFIT_TRY_ASSIGN(auto session, Session::connect(Role::observer, name, here, deadline));
  return Observer(std::make_unique<Impl>(std::move(session), std::move(here.socket_path)));
}

Result<DaemonStatus> Observer::status(Deadline deadline) {
  Session& session = *impl_->session;
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateStatusQuery(fbb));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::status, deadline, Expect::long_running));
  const auto* body = reply->body_as_Status();
  if (body == nullptr) return fail(Errc::protocol, "the daemon's reply is not a status");
  DaemonStatus status;
  status.version = view(body->daemon_version());
  status.copy_kernel = view(body->copy_kernel());
  status.socket = view(body->socket());
  status.pid = body->pid();
  status.copy_threads = body->copy_threads();
  status.uptime_us = body->uptime_us();
  status.refits = body->refits();
  status.waiting = static_cast<Waiting>(body->waiting());
  status.draining = body->draining();
  if (body->sessions() != nullptr) {
    for (const auto* entry : *body->sessions()) {
      status.sessions.push_back(
          {entry->id(), static_cast<Role>(entry->role()), std::string(view(entry->name())),
           entry->uid(), entry->pid(), entry->modules(), entry->asleep(), entry->regions(),
           entry->registered_bytes(), entry->in_flight(), entry->age_us(), entry->restricted()});
    }
  }
  if (body->modules() != nullptr) {
    for (const auto* entry : *body->modules()) {
      ModuleStatus module;
      module.engine = view(entry->engine());
      module.module = view(entry->module_name());
      module.state = static_cast<ModuleState>(entry->state());
      module.version = entry->version();
      module.source = view(entry->source());
      module.transaction = from_wire(entry->transaction());
      module.tensors = entry->tensors();
      module.bytes = entry->bytes();
      module.refits = entry->refits();
      module.last_bytes = entry->last_bytes();
      module.last = phases_from_wire(entry->last());
      module.populated = entry->populated();
      module.asleep = entry->asleep();
      module.uid = entry->uid();
      module.restricted = entry->restricted();
      if (entry->proven()) module.proven_version = entry->proven_version();
      status.modules.push_back(std::move(module));
    }
  }
  return status;
}

Result<std::vector<TensorSpec>> Observer::tensors(const std::string& engine,
                                                  const std::string& module, Deadline deadline) {
  Session& session = *impl_->session;
  auto& fbb = session.builder();
  const auto engine_name = fbb.CreateString(engine);
  const auto module_name = fbb.CreateString(module);
  fbb.Finish(wire::CreateTensorsQuery(fbb, engine_name, module_name));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::tensors, deadline, Expect::long_running));
  const auto* body = reply->body_as_TensorList();
  if (body == nullptr) return fail(Errc::protocol, "the daemon's reply is not a tensor list");
  std::vector<TensorSpec> tensors;
  if (body->tensors() == nullptr) return tensors;
  for (const auto* entry : *body->tensors()) {
    TensorSpec spec;
    spec.name = view(entry->name());
    spec.dtype = static_cast<DType>(entry->dtype());
    spec.shape = dims_from_wire(entry->shape());
    spec.strides = dims_from_wire(entry->strides());
    spec.region = entry->region();
    spec.offset_bytes = entry->offset();
    spec.global_shape = dims_from_wire(entry->global_shape());
    spec.box_offset = dims_from_wire(entry->box_offset());
    spec.layer_buffer = entry->layer_buffer();
    spec.layer_offset_bytes = entry->layer_offset();
    tensors.push_back(std::move(spec));
  }
  return tensors;
}

Result<CheckReport> Observer::check(const CheckRequest& request, Deadline deadline) {
  return impl_->told(refit::check(*impl_->session, request, deadline), request.engine);
}

Result<DigestReport> Observer::digest(const DigestRequest& request, Deadline deadline) {
  return impl_->told(refit::digest(*impl_->session, request, deadline), request.engine);
}

Result<DaemonMetrics> Observer::metrics(Deadline deadline) {
  Session& session = *impl_->session;
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateMetricsQuery(fbb));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::metrics, deadline, Expect::long_running));
  const auto* body = reply->body_as_Metrics();
  if (body == nullptr) return fail(Errc::protocol, "the daemon's reply is not metrics");
  DaemonMetrics metrics;
  metrics.version = view(body->daemon_version());
  metrics.copy_kernel = view(body->copy_kernel());
  metrics.protocol = body->protocol();
  metrics.layout = body->layout();
  metrics.waiting = static_cast<Waiting>(body->waiting());
  metrics.draining = body->draining();
  metrics.uptime_us = body->uptime_us();
  metrics.committed = body->committed();
  metrics.moved_bytes = body->moved_bytes();
  if (body->failures() != nullptr) {
    for (const auto* entry : *body->failures())
      metrics.failures[static_cast<Errc>(entry->code())] += entry->count();
  }
  if (body->bounds_us() != nullptr)
    metrics.bounds_us.assign(body->bounds_us()->begin(), body->bounds_us()->end());
  const std::size_t buckets = metrics.bounds_us.size() + 1;
  metrics.wait = histogram_from_wire(body->wait(), buckets);
  metrics.gate = histogram_from_wire(body->gate(), buckets);
  metrics.copy = histogram_from_wire(body->copy(), buckets);
  metrics.total = histogram_from_wire(body->total(), buckets);
  metrics.checks = body->checks();
  metrics.tensors_verified = body->tensors_verified();
  metrics.tensors_mismatched = body->tensors_mismatched();
  metrics.tensors_missing = body->tensors_missing();
  metrics.proofs = {body->proofs_equal(), body->proofs_different(), body->proofs_overtaken(),
                    body->proofs_unreadable(), body->proofs_refuted()};
  if (body->quotas() != nullptr) {
    for (const auto* entry : *body->quotas()) {
      metrics.quotas.push_back(
          {entry->uid(), std::string(view(entry->quota())), entry->used(), entry->limit()});
    }
  }
  if (body->modules() != nullptr) {
    for (const auto* entry : *body->modules()) {
      ModuleMetrics module;
      module.engine = view(entry->engine());
      module.module = view(entry->module_name());
      module.uid = entry->uid();
      module.state = static_cast<ModuleState>(entry->state());
      module.version = entry->version();
      module.refits = entry->refits();
      module.bytes = entry->bytes();
      if (entry->proven())
        module.proof = ModuleProof{entry->proven_version(), entry->proven_age_us()};
      metrics.modules.push_back(std::move(module));
    }
  }
  return metrics;
}

Result<void> Observer::drain(Deadline deadline) {
  Session& session = *impl_->session;
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateDrain(fbb));
  REFIT_TRY(session.call(wire::Opcode::drain, deadline, Expect::long_running));
  return {};
}

Result<void> Observer::wait_gone(Deadline deadline) {
  for (;;) {
    pollfd entry{impl_->session->pidfd(), POLLIN, 0};
    const int count = ::poll(&entry, 1, deadline.remaining_ms());
    if (count > 0) return {};
    if (count == 0 && deadline.passed()) return fail(Errc::deadline, "the daemon still runs");
    if (count < 0 && errno != EINTR) return fail_os("waiting for the daemon's end", errno);
  }
}

Result<ReloadReport> Observer::reload(Deadline deadline) {
  Session& session = *impl_->session;
  auto& fbb = session.builder();
  fbb.Finish(wire::CreateReloadQuery(fbb));
  REFIT_TRY_ASSIGN(const wire::Reply* reply,
                   session.call(wire::Opcode::reload, deadline, Expect::long_running));
  const auto* body = reply->body_as_Reloaded();
  if (body == nullptr) return fail(Errc::protocol, "the daemon's reply is not a reload's");
  return ReloadReport{std::string(view(body->file())), strings_from_wire(body->changed()),
                      strings_from_wire(body->needs_restart())};
}

}  // namespace refit
