#include "server/checker.hpp"

#include <algorithm>
#include <utility>

#include "ipc/state_word.hpp"
#include "server/decode.hpp"
#include "server/hashing.hpp"

namespace refit::daemon {

/// One check or digest request, from admission to reply.
class Checker::CheckOperation final : public Operation {
 public:
  explicit CheckOperation(Checker& checker) : owner(checker) {}
  [[nodiscard]] bool exclusive() const noexcept override { return false; }
  [[nodiscard]] bool runnable() const override { return hashing.registration->populated; }
  void start() override {
    running = true;
    owner.hash(*this);
  }

  Checker& owner;
  std::uint64_t session_id = 0;
  std::uint64_t request_id = 0;
  std::shared_ptr<Module> module;
  Clock::time_point deadline;
  bool running = false;

  Place place = Place::host;
  Hashing hashing;
  std::vector<std::string> absent;

  bool is_check = false;
  std::vector<Digest> expected;  ///< of the tensors to be hashed, by the same index
  std::vector<std::string> missing;

  ModuleReading reading;
};

Checker::Checker(Registry& registry, Scheduler& scheduler, Replies& replies,
                 BackgroundPool& background, DeviceAccess& devices, Statistics& statistics)
    : registry_(registry),
      scheduler_(scheduler),
      replies_(replies),
      background_(background),
      devices_(devices),
      statistics_(statistics) {}

Checker::~Checker() = default;

Result<std::unique_ptr<Checker::CheckOperation>> Checker::prepare(
    Session& asker, std::uint64_t request_id, std::string_view engine_name,
    std::string_view module_name, std::uint8_t kind, std::uint8_t place, std::uint64_t deadline_us,
    Clock::time_point now) {
  REFIT_TRY_ASSIGN(auto engine, registry_.awake_engine_for(asker, engine_name));
  REFIT_TRY_ASSIGN(auto module, registry_.module_of(*engine, module_name));
  if (kind > static_cast<std::uint8_t>(DigestKind::xxh3)) {
    return fail(Errc::bad_argument, "digest kind " + std::to_string(kind) + " does not exist");
  }
  if (place > static_cast<std::uint8_t>(Place::all)) {
    return fail(Errc::bad_argument, "place " + std::to_string(place) + " does not exist");
  }
  auto operation = std::make_unique<CheckOperation>(*this);
  operation->place = static_cast<Place>(place);
  operation->session_id = asker.id;
  operation->request_id = request_id;
  operation->hashing.registration = module->registration;
  operation->module = std::move(module);
  operation->engines.push_back(std::move(engine));
  operation->hashing.kind = static_cast<DigestKind>(kind);
  operation->deadline = deadline_after(now, deadline_us);
  return operation;
}

/// Takes what was asked for apart into places.
void Checker::admit(std::unique_ptr<CheckOperation> operation) {
  Hashing& hashing = operation->hashing;
  const auto asked = std::exchange(hashing.tensors, {});
  const std::vector<Digest> expected = std::exchange(operation->expected, {});
  const auto add = [&](std::size_t index) {
    hashing.tensors.push_back(asked[index]);
    if (!expected.empty()) operation->expected.push_back(expected[index]);
  };
  for (std::size_t i = 0; i < asked.size() && operation->place != Place::device; ++i) add(i);
  hashing.host_count = hashing.tensors.size();
  for (std::size_t i = 0; i < asked.size() && operation->place != Place::host; ++i) {
    if (asked[i]->layer_buffer == kNoLayerBuffer) {
      operation->absent.push_back(asked[i]->name);
    } else {
      add(i);
    }
  }
  CheckOperation& admitted = *operation;
  operations_.push_back(std::move(operation));
  scheduler_.enqueue(admitted);
}

void Checker::begin_check(Session& asker, std::uint64_t request_id, const wire::Check& message,
                          Clock::time_point now) {
  auto prepared = prepare(asker, request_id, view(message.engine()), view(message.module_name()),
                          message.kind(), message.place(), message.deadline_us(), now);
  if (!prepared) return replies_.send_error(asker, request_id, prepared.error());
  CheckOperation& operation = **prepared;
  auto expected = decode_expected(message.expected(), message.kind(), "a check");
  if (!expected) return replies_.send_error(asker, request_id, expected.error());
  if (expected->empty()) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument, 0, "a check needs at least one expected digest", {}});
  }
  operation.is_check = true;
  for (auto& [name, digest] : *expected) {
    const TensorSpec* spec = operation.hashing.registration->manifest->find(name);
    if (spec == nullptr) {
      operation.missing.push_back(std::move(name));
      continue;
    }
    operation.hashing.tensors.push_back(spec);
    operation.expected.push_back(digest);
  }
  std::sort(operation.missing.begin(), operation.missing.end());
  admit(std::move(*prepared));
}

void Checker::begin_digest(Session& asker, std::uint64_t request_id,
                           const wire::DigestQuery& message, Clock::time_point now) {
  auto prepared = prepare(asker, request_id, view(message.engine()), view(message.module_name()),
                          message.kind(), message.place(), message.deadline_us(), now);
  if (!prepared) return replies_.send_error(asker, request_id, prepared.error());
  CheckOperation& operation = **prepared;
  const Manifest& manifest = *operation.hashing.registration->manifest;
  operation.hashing.per_module = message.per_module();
  auto selection = decode_tensor_names(message.selection(), "the selection");
  if (!selection) return replies_.send_error(asker, request_id, selection.error());
  if (operation.hashing.per_module && !selection->empty()) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument,
         0,
         "a module's digest covers all of its tensors; ask for it without a selection",
         {}});
  }
  if (operation.hashing.per_module && operation.place == Place::device) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument,
         0,
         "a module's digest covers all of its tensors, and not all have a place on the device",
         {}});
  }
  std::vector<std::string> unknown;
  for (const std::string& name : *selection) {
    const TensorSpec* spec = manifest.find(name);
    if (spec == nullptr) {
      unknown.push_back("tensor " + name + " is not in " + manifest.label());
    } else {
      operation.hashing.tensors.push_back(spec);
    }
  }
  if (!unknown.empty()) {
    std::sort(unknown.begin(), unknown.end());
    return replies_.send_error(
        asker, request_id,
        {Errc::manifest_mismatch, 0,
         "selected tensors that do not exist: " + std::to_string(unknown.size()),
         std::move(unknown)});
  }
  if (selection->empty()) {
    for (const TensorSpec& spec : manifest.tensors()) operation.hashing.tensors.push_back(&spec);
  }
  std::sort(operation.hashing.tensors.begin(), operation.hashing.tensors.end(),
            [](const TensorSpec* a, const TensorSpec* b) { return comes_first(*a, *b); });
  admit(std::move(*prepared));
}

void Checker::hash(CheckOperation& operation) {
  const auto& engine = *operation.engines.front();
  operation.reading = read_module(engine.memory->response_region().modules[operation.module->slot]);
  operation.hashing.session = engine.memory;
  background_.submit(HashJob::make(operation.hashing, devices_, background_.thread_count(),
                                   [this, &operation](const std::optional<Error>& error) {
                                     finish(operation, error);
                                   }),
                     BackgroundPool::Priority::last);
}

void Checker::finish(CheckOperation& operation, const std::optional<Error>& error) {
  if (const auto asker = registry_.find(operation.session_id)) {
    if (operation.hashing.cancelled.load()) {
      const Session& engine = *operation.engines.front();
      replies_.send_error(*asker, operation.request_id,
                          engine.asleep
                              ? asleep_error(engine)
                              : Error{Errc::shutting_down, 0, "the daemon is shutting down", {}});
    } else if (error) {
      replies_.send_error(*asker, operation.request_id, *error);
    } else if (note_absent(operation); operation.is_check) {
      reply_check(*asker, operation);
    } else {
      reply_digest(*asker, operation);
    }
  }
  if (error) devices_.judge(*error);
  // What waits for the engine may want its memory gone (Sleeper).
  operation.hashing.registration.reset();
  scheduler_.leave(operation);
  remove(operation);
}

/// Layers that were not there, or never long enough to be hashed.
void Checker::note_absent(CheckOperation& operation) {
  for (std::size_t i = operation.hashing.host_count; i < operation.hashing.tensors.size(); ++i) {
    if (operation.hashing.digests[i].length == 0)
      operation.absent.push_back(operation.hashing.tensors[i]->name);
  }
  std::sort(operation.absent.begin(), operation.absent.end());
}

/// A check of all tensors, in every place that they have, proves the version if it found them
/// equal, whoever asked for it.
void Checker::note_check(const CheckOperation& operation, std::size_t verified, std::size_t wrong) {
  statistics_.checked(verified, wrong, operation.missing.size());
  const ModuleState state = operation.reading.word.state;
  const bool whole = state == ModuleState::initial || state == ModuleState::committed;
  const Manifest& manifest = *operation.hashing.registration->manifest;
  const bool every_place = operation.hashing.host_count == manifest.tensors().size() &&
                           (manifest.layer_buffers().empty() || operation.place == Place::all);
  if (whole && every_place && wrong == 0 && operation.missing.empty()) {
    operation.hashing.registration->proof = Proof{operation.reading.version, Clock::now()};
  }
}

void Checker::reply_check(Session& asker, const CheckOperation& operation) {
  std::vector<std::string> mismatched;
  std::vector<std::string> device_mismatched;
  std::vector<const TensorSpec*> seen;
  std::vector<const TensorSpec*> wrong;
  for (std::size_t i = 0; i < operation.hashing.tensors.size(); ++i) {
    const TensorSpec* spec = operation.hashing.tensors[i];
    const bool on_device = i >= operation.hashing.host_count;
    if (on_device && operation.hashing.digests[i].length == 0) continue;
    seen.push_back(spec);
    if (operation.hashing.digests[i] == operation.expected[i]) continue;
    wrong.push_back(spec);
    (on_device ? device_mismatched : mismatched).push_back(spec->name);
  }
  std::sort(mismatched.begin(), mismatched.end());
  std::sort(device_mismatched.begin(), device_mismatched.end());
  const auto distinct = [](std::vector<const TensorSpec*>& specs) {
    std::sort(specs.begin(), specs.end(), std::less<>());
    return std::unique(specs.begin(), specs.end()) - specs.begin();
  };
  const auto wrong_count = static_cast<std::size_t>(distinct(wrong));
  const auto verified =
      static_cast<std::uint32_t>(distinct(seen)) - static_cast<std::uint32_t>(wrong_count);
  note_check(operation, verified, wrong_count);
  const std::optional<Proof>& proof = operation.hashing.registration->proof;
  auto& fbb = replies_.builder();
  const auto missing_list = fbb.CreateVectorOfStrings(operation.missing);
  const auto mismatched_list = fbb.CreateVectorOfStrings(mismatched);
  const auto device_list = fbb.CreateVectorOfStrings(device_mismatched);
  const auto absent_list = fbb.CreateVectorOfStrings(operation.absent);
  replies_.send(asker, operation.request_id, wire::Body::Checked,
                wire::CreateChecked(fbb, verified, missing_list, mismatched_list,
                                    static_cast<std::uint8_t>(operation.reading.word.state),
                                    operation.reading.version, device_list, absent_list,
                                    proof.has_value(), proof ? proof->version : 0)
                    .Union());
}

void Checker::reply_digest(Session& asker, const CheckOperation& operation) {
  auto& fbb = replies_.builder();
  std::vector<flatbuffers::Offset<wire::TensorDigest>> list;
  std::vector<flatbuffers::Offset<wire::TensorDigest>> on_device;
  for (std::size_t i = 0; i < operation.hashing.tensors.size(); ++i) {
    const bool host = i < operation.hashing.host_count;
    if (!host && operation.hashing.digests[i].length == 0) continue;
    const auto name = fbb.CreateString(operation.hashing.tensors[i]->name);
    const auto value = fbb.CreateVector(operation.hashing.digests[i].bytes.data(),
                                        operation.hashing.digests[i].length);
    (host ? list : on_device).push_back(wire::CreateTensorDigest(fbb, name, value));
  }
  const auto tensors = fbb.CreateVector(list);
  const auto device = fbb.CreateVector(on_device);
  const auto absent = fbb.CreateVectorOfStrings(operation.absent);
  const auto module = fbb.CreateVector(operation.hashing.module_digest.bytes.data(),
                                       operation.hashing.module_digest.length);
  replies_.send(asker, operation.request_id, wire::Body::Digests,
                wire::CreateDigests(fbb, tensors, module,
                                    static_cast<std::uint8_t>(operation.reading.word.state),
                                    operation.reading.version, device, absent)
                    .Union());
}

void Checker::fail_waiting(CheckOperation& operation, const Error& error) {
  if (const auto asker = registry_.find(operation.session_id))
    replies_.send_error(*asker, operation.request_id, error);
  scheduler_.withdraw(operation);
  remove(operation);
}

void Checker::remove(CheckOperation& operation) {
  std::erase_if(operations_, [&](const auto& entry) { return entry.get() == &operation; });
}

/// Failing one operation may start others, so every walk begins anew after each.
template <typename Predicate>
Checker::CheckOperation* Checker::find_waiting(Predicate&& matches) {
  for (const auto& operation : operations_) {
    if (!operation->running && matches(*operation)) return operation.get();
  }
  return nullptr;
}

void Checker::on_session_end(Session& session) {
  const auto concerned = [&](const CheckOperation& one) {
    return one.session_id == session.id || one.engines.front().get() == &session;
  };
  // Nobody reads what a dead asker wanted; what runs stops at its next tensor.
  for (const auto& operation : operations_) {
    if (operation->session_id == session.id) operation->hashing.cancelled.store(true);
  }
  while (CheckOperation* operation = find_waiting(concerned)) {
    fail_waiting(*operation, {Errc::engine_gone, 0, session.label() + " is gone", {}});
  }
}

void Checker::on_registration_end(Module& module) {
  while (CheckOperation* operation =
             find_waiting([&](const CheckOperation& one) { return one.module.get() == &module; })) {
    fail_waiting(*operation, {Errc::engine_not_ready,
                              0,
                              operation->hashing.registration->manifest->label() +
                                  " was registered anew while the check waited",
                              {}});
  }
}

void Checker::on_engine_sleep(Session& engine) {
  const auto concerned = [&](const CheckOperation& one) {
    return one.engines.front().get() == &engine;
  };
  for (const auto& operation : operations_) {
    if (concerned(*operation)) operation->hashing.cancelled.store(true);
  }
  while (CheckOperation* operation = find_waiting(concerned))
    fail_waiting(*operation, asleep_error(engine));
}

Clock::time_point Checker::next_deadline() const {
  auto next = Clock::time_point::max();
  for (const auto& operation : operations_) {
    if (!operation->running) next = std::min(next, operation->deadline);
  }
  return next;
}

Clock::time_point Checker::on_time(Clock::time_point now) {
  while (CheckOperation* late =
             find_waiting([now](const CheckOperation& one) { return now >= one.deadline; })) {
    fail_waiting(*late, {Errc::deadline,
                         0,
                         late->hashing.registration->manifest->label() +
                             ": the check waited too long for a refit or for pages",
                         {}});
  }
  return next_deadline();
}

void Checker::cancel(const Error& reason) {
  while (CheckOperation* operation = find_waiting([](const CheckOperation&) { return true; }))
    fail_waiting(*operation, reason);
  for (const auto& operation : operations_) operation->hashing.cancelled.store(true);
}

}  // namespace refit::daemon
