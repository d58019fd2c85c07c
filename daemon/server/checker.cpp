#include "server/checker.hpp"

#include <algorithm>
#include <atomic>
#include <mutex>

#include "ipc/residency_word.hpp"
#include "ipc/state_word.hpp"
#include "memory/sigbus_guard.hpp"
#include "plan/residency.hpp"
#include "server/decode.hpp"

namespace refit::daemon {
namespace {

/// Small tensors share a part, so that handing parts out costs nothing beside hashing.
constexpr std::uint64_t kPartBytes = std::uint64_t{2} << 20;

constexpr std::uint64_t kDeadlineUsMax = 3'600'000'000;

/// How often a layer may move under one digest before it counts as absent.
constexpr int kAttempts = 8;

std::uint64_t bytes_of(const TensorSpec& spec) {
  std::uint64_t bytes = element_bytes(spec.dtype);
  for (const std::uint64_t extent : spec.shape) bytes *= extent;
  return bytes;
}

/// From the first byte of the first element to behind the last one's; not of an empty tensor.
std::uint64_t span_bytes(const TensorSpec& spec) {
  std::uint64_t last = 0;
  for (std::size_t i = 0; i < spec.shape.size(); ++i) last += (spec.shape[i] - 1) * spec.strides[i];
  return (last + 1) * element_bytes(spec.dtype);
}

/// Its elements stand in row-major order without gaps.
bool is_contiguous(const TensorSpec& spec) {
  std::uint64_t expected = 1;
  for (std::size_t i = spec.shape.size(); i-- > 0;) {
    if (spec.shape[i] != 1 && spec.strides[i] != expected) return false;
    expected *= spec.shape[i];
  }
  return true;
}

}  // namespace

/// One check or digest request, from admission to reply.
class Checker::CheckOperation final : public Operation {
 public:
  explicit CheckOperation(Checker& checker) : owner(checker) {}
  [[nodiscard]] bool exclusive() const noexcept override { return false; }
  [[nodiscard]] bool runnable() const override { return registration->populated; }
  void start() override {
    running = true;
    owner.hash(*this);
  }

  Checker& owner;
  std::uint64_t session_id = 0;
  std::uint64_t request_id = 0;
  std::shared_ptr<Module> module;
  std::shared_ptr<Registration> registration;
  DigestKind kind = DigestKind::sglang;
  Clock::time_point deadline;
  bool running = false;
  std::atomic<bool> cancelled{false};  ///< nobody waits for the rest: pool threads skip it

  Place place = Place::host;

  /// What is hashed: first places on the host, then those on the device; in the order of names
  /// unless it is a check. A device place that is not there gets no digest (length 0).
  std::vector<const TensorSpec*> tensors;
  std::size_t host_count = 0;
  std::vector<Digest> digests;  ///< of tensors, by the same index
  std::vector<std::string> absent;
  bool per_module = false;
  Digest module_digest;

  bool is_check = false;
  std::vector<Digest> expected;  ///< of tensors, by the same index
  std::vector<std::string> missing;

  ModuleReading reading;
};

/// Hashes on pool threads. Part 0 is the module's serial stream, if asked for; the largest tensors
/// come next.
class Checker::HashJob final : public BackgroundJob {
 public:
  static std::unique_ptr<HashJob> make(CheckOperation& operation) {
    std::vector<std::uint32_t> order(operation.tensors.size());
    for (std::uint32_t i = 0; i < order.size(); ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](std::uint32_t a, std::uint32_t b) {
      return bytes_of(*operation.tensors[a]) > bytes_of(*operation.tensors[b]);
    });
    std::vector<std::uint32_t> begins;
    std::uint64_t bytes = kPartBytes;
    for (std::uint32_t i = 0; i < order.size(); ++i) {
      if (bytes >= kPartBytes) {
        begins.push_back(i);
        bytes = 0;
      }
      bytes +=
          bytes_of(*operation.tensors[order[i]]) + 4096;  // each tensor also costs its own start
    }
    return std::unique_ptr<HashJob>(new HashJob(operation, std::move(order), std::move(begins)));
  }

  void run_part(std::size_t part) override {
    if (operation_.cancelled.load()) return;
    if (operation_.per_module) {
      if (part == 0) return hash_module();
      --part;
    }
    const std::size_t end = part + 1 < begins_.size() ? begins_[part + 1] : order_.size();
    Hasher hasher(operation_.kind);
    for (std::size_t i = begins_[part]; i < end && !operation_.cancelled.load(); ++i) {
      const std::uint32_t index = order_[i];
      // After a fault the hasher was left in the middle of a stream.
      if (!(index < operation_.host_count ? hash(hasher, index) : hash_device(hasher, index)))
        return;
    }
  }

  void finished() override { operation_.owner.finish(operation_, error_); }

 private:
  HashJob(CheckOperation& operation, std::vector<std::uint32_t> order,
          std::vector<std::uint32_t> begins)
      : BackgroundJob(begins.size() + (operation.per_module ? 1 : 0)),
        operation_(operation),
        order_(std::move(order)),
        begins_(std::move(begins)) {
    for (const MappedRegion& region : operation_.registration->regions) {
      if (region.kind == RegionKind::host)
        ranges_.push_back({region.host.data(), region.host.bytes()});
    }
  }

  template <typename Body>
  bool guarded(Body&& body) const {
    return run_guarded(ranges_.data(), ranges_.size(), body);
  }

  bool fail(Error error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    return false;
  }
  bool fault() {
    return fail({Errc::memory_fault,
                 0,
                 operation_.registration->manifest->label() +
                     ": the engine's memory faulted (SIGBUS) while it was hashed",
                 {}});
  }

  /// Feeds the tensor's bytes from wherever they are: `offset` of `region`. False and an error if
  /// they cannot be read.
  bool feed(Hasher& hasher, const TensorSpec& spec, const MappedRegion& region,
            std::uint64_t offset) {
    if (region.kind == RegionKind::host) {
      const TensorView view{&spec, region.data() + offset};
      return guarded([&] { update_with_elements(hasher, view); }) || fault();
    }
    const auto devices =
        operation_.owner.devices_.required(operation_.registration->manifest->label());
    if (!devices) return fail(devices.error());
    if (bytes_of(spec) == 0) return true;
    const std::uint64_t span = span_bytes(spec);
    std::vector<std::byte> gathered;  // of a strided tensor only: all that its elements lie among
    const bool strided = !is_contiguous(spec);
    if (strided) gathered.reserve(span);
    const auto read =
        (*devices)->read(*region.device, offset, span, [&](std::span<const std::byte> chunk) {
          if (strided) {
            gathered.insert(gathered.end(), chunk.begin(), chunk.end());
          } else {
            hasher.update(chunk);
          }
        });
    if (!read) return fail(read.error());
    if (strided) update_with_elements(hasher, {&spec, gathered.data()});
    return true;
  }

  /// The tensor's digest. None after an error, which leaves the hasher in the middle of a stream.
  std::optional<Digest> digest_at(Hasher& hasher, const TensorSpec& spec,
                                  const MappedRegion& region, std::uint64_t offset) {
    update_with_prefix(hasher, operation_.kind, spec);
    if (!feed(hasher, spec, region, offset)) return {};
    return hasher.finish();
  }

  [[nodiscard]] const MappedRegion& region_of(const TensorSpec& spec) const {
    return operation_.registration->regions[spec.region];
  }

  bool hash(Hasher& hasher, std::uint32_t index) {
    const TensorSpec& spec = *operation_.tensors[index];
    const auto digest = digest_at(hasher, spec, region_of(spec), spec.offset_bytes);
    if (!digest) return false;
    operation_.digests[index] = *digest;
    return true;
  }

  /// The word is not trusted, but a stale one is found: its generation grows with every change, and
  /// the engine stores it before it touches the bytes of a place that it gives up. The second load
  /// must not be made before the bytes are read, which x86-64 does not do.
  bool hash_device(Hasher& hasher, std::uint32_t index) {
    const Registration& registration = *operation_.registration;
    const TensorSpec& spec = *operation_.tensors[index];
    const SharedWord<std::uint64_t>& word =
        operation_.engines.front()->memory->request_region().residency[registration.residency_base +
                                                                       spec.layer_buffer];
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
      const std::uint64_t before = word.load();
      if (ResidencyWord::unpack(before).state == ResidencyState::unsaid) return true;
      const auto place = read_place(*registration.manifest, spec.layer_buffer, before);
      if (!place) return fail(place.error());
      if (!place->resident) return true;
      const auto digest = digest_at(hasher, spec, registration.regions[place->region],
                                    place->offset + spec.layer_offset_bytes);
      if (!digest) return false;
      if (word.load() != before) continue;
      operation_.digests[index] = *digest;
      return true;
    }
    return true;
  }

  /// The stream of digest_module; begin_digest has sorted the tensors for it.
  void hash_module() {
    Hasher hasher(operation_.kind);
    for (std::size_t i = 0; i < operation_.host_count; ++i) {
      if (operation_.cancelled.load()) return;
      const TensorSpec& spec = *operation_.tensors[i];
      hasher.update(spec.name);
      if (!feed(hasher, spec, region_of(spec), spec.offset_bytes)) return;
    }
    operation_.module_digest = hasher.finish();
  }

  CheckOperation& operation_;
  std::vector<std::uint32_t> order_;
  std::vector<std::uint32_t> begins_;  ///< of parts, into order_
  std::vector<GuardedRange> ranges_;
  std::mutex mutex_;
  std::optional<Error> error_;  ///< guarded by mutex_ while parts run
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
  operation->registration = module->registration;
  operation->module = std::move(module);
  operation->engines.push_back(std::move(engine));
  operation->kind = static_cast<DigestKind>(kind);
  operation->deadline = now + std::chrono::microseconds(std::min(deadline_us, kDeadlineUsMax));
  return operation;
}

/// Takes what was asked for apart into places.
void Checker::admit(std::unique_ptr<CheckOperation> operation) {
  const std::vector<const TensorSpec*> asked = std::exchange(operation->tensors, {});
  const std::vector<Digest> expected = std::exchange(operation->expected, {});
  const auto add = [&](std::size_t index) {
    operation->tensors.push_back(asked[index]);
    if (!expected.empty()) operation->expected.push_back(expected[index]);
  };
  for (std::size_t i = 0; i < asked.size() && operation->place != Place::device; ++i) add(i);
  operation->host_count = operation->tensors.size();
  for (std::size_t i = 0; i < asked.size() && operation->place != Place::host; ++i) {
    if (asked[i]->layer_buffer == kNoLayerBuffer) {
      operation->absent.push_back(asked[i]->name);
    } else {
      add(i);
    }
  }
  operation->digests.resize(operation->tensors.size());
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
  if (operation.kind == DigestKind::xxh3) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument, 0, "a check needs SHA-256 (sglang or raw); XXH3 proves nothing", {}});
  }
  if (message.expected() == nullptr || message.expected()->size() == 0) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument, 0, "a check needs at least one expected digest", {}});
  }
  operation.is_check = true;
  const ManifestLimits limits;
  if (message.expected()->size() > limits.tensors_max) {
    return replies_.send_error(
        asker, request_id,
        {Errc::quota,
         0,
         std::to_string(message.expected()->size()) + " expected digests; the limit is " +
             std::to_string(limits.tensors_max),
         {}});
  }
  std::vector<std::string_view> seen;
  for (const auto* entry : *message.expected()) {
    const std::string_view name = view(entry->name());
    if (name.size() > limits.name_bytes_max || entry->value() == nullptr ||
        entry->value()->size() != 32) {
      return replies_.send_error(
          asker, request_id,
          {Errc::bad_argument,
           0,
           "the expected digest of " + std::string(name.substr(0, limits.name_bytes_max)) +
               " has not 32 bytes, or its name is too long",
           {}});
    }
    seen.push_back(name);
  }
  std::sort(seen.begin(), seen.end());
  if (const auto twice = std::adjacent_find(seen.begin(), seen.end()); twice != seen.end()) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument, 0, "tensor " + std::string(*twice) + " is expected twice", {}});
  }
  for (const auto* entry : *message.expected()) {
    const TensorSpec* spec = operation.registration->manifest->find(view(entry->name()));
    if (spec == nullptr) {
      operation.missing.emplace_back(view(entry->name()));
      continue;
    }
    Digest expected;
    expected.length = 32;
    std::copy(entry->value()->begin(), entry->value()->end(), expected.bytes.begin());
    operation.tensors.push_back(spec);
    operation.expected.push_back(expected);
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
  const Manifest& manifest = *operation.registration->manifest;
  operation.per_module = message.per_module();
  auto selection = decode_tensor_names(message.selection(), "the selection");
  if (!selection) return replies_.send_error(asker, request_id, selection.error());
  if (operation.per_module && !selection->empty()) {
    return replies_.send_error(
        asker, request_id,
        {Errc::bad_argument,
         0,
         "a module's digest covers all of its tensors; ask for it without a selection",
         {}});
  }
  if (operation.per_module && operation.place == Place::device) {
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
      operation.tensors.push_back(spec);
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
    for (const TensorSpec& spec : manifest.tensors()) operation.tensors.push_back(&spec);
  }
  std::sort(operation.tensors.begin(), operation.tensors.end(),
            [](const TensorSpec* a, const TensorSpec* b) { return a->name < b->name; });
  admit(std::move(*prepared));
}

void Checker::hash(CheckOperation& operation) {
  const auto& engine = *operation.engines.front();
  operation.reading = read_module(engine.memory->response_region().modules[operation.module->slot]);
  background_.submit(HashJob::make(operation), BackgroundPool::Priority::last);
}

void Checker::finish(CheckOperation& operation, const std::optional<Error>& error) {
  if (const auto asker = registry_.find(operation.session_id)) {
    if (operation.cancelled.load()) {
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
  operation.registration.reset();
  scheduler_.leave(operation);
  remove(operation);
}

/// Layers that were not there, or never long enough to be hashed.
void Checker::note_absent(CheckOperation& operation) {
  for (std::size_t i = operation.host_count; i < operation.tensors.size(); ++i) {
    if (operation.digests[i].length == 0) operation.absent.push_back(operation.tensors[i]->name);
  }
  std::sort(operation.absent.begin(), operation.absent.end());
}

/// A check of all tensors that found them equal proves the version, whoever asked for it.
void Checker::note_check(const CheckOperation& operation, std::size_t verified, std::size_t wrong) {
  statistics_.checked(verified, wrong, operation.missing.size());
  const ModuleState state = operation.reading.word.state;
  const bool whole = state == ModuleState::initial || state == ModuleState::committed;
  if (whole && wrong == 0 && operation.missing.empty() &&
      operation.host_count == operation.registration->manifest->tensors().size()) {
    operation.registration->proof = Proof{operation.reading.version, Clock::now()};
  }
}

void Checker::reply_check(Session& asker, const CheckOperation& operation) {
  std::vector<std::string> mismatched;
  std::vector<std::string> device_mismatched;
  std::vector<const TensorSpec*> seen;
  std::vector<const TensorSpec*> wrong;
  for (std::size_t i = 0; i < operation.tensors.size(); ++i) {
    const TensorSpec* spec = operation.tensors[i];
    const bool on_device = i >= operation.host_count;
    if (on_device && operation.digests[i].length == 0) continue;
    seen.push_back(spec);
    if (operation.digests[i] == operation.expected[i]) continue;
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
  auto& fbb = replies_.builder();
  const auto missing_list = fbb.CreateVectorOfStrings(operation.missing);
  const auto mismatched_list = fbb.CreateVectorOfStrings(mismatched);
  const auto device_list = fbb.CreateVectorOfStrings(device_mismatched);
  const auto absent_list = fbb.CreateVectorOfStrings(operation.absent);
  replies_.send(asker, operation.request_id, wire::Body::Checked,
                wire::CreateChecked(fbb, verified, missing_list, mismatched_list,
                                    static_cast<std::uint8_t>(operation.reading.word.state),
                                    operation.reading.version, device_list, absent_list)
                    .Union());
}

void Checker::reply_digest(Session& asker, const CheckOperation& operation) {
  auto& fbb = replies_.builder();
  std::vector<flatbuffers::Offset<wire::TensorDigest>> list;
  std::vector<flatbuffers::Offset<wire::TensorDigest>> on_device;
  for (std::size_t i = 0; i < operation.tensors.size(); ++i) {
    const bool host = i < operation.host_count;
    if (!host && operation.digests[i].length == 0) continue;
    const auto name = fbb.CreateString(operation.tensors[i]->name);
    const auto value =
        fbb.CreateVector(operation.digests[i].bytes.data(), operation.digests[i].length);
    (host ? list : on_device).push_back(wire::CreateTensorDigest(fbb, name, value));
  }
  const auto tensors = fbb.CreateVector(list);
  const auto device = fbb.CreateVector(on_device);
  const auto absent = fbb.CreateVectorOfStrings(operation.absent);
  const auto module =
      fbb.CreateVector(operation.module_digest.bytes.data(), operation.module_digest.length);
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
    if (operation->session_id == session.id) operation->cancelled.store(true);
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
                              operation->registration->manifest->label() +
                                  " was registered anew while the check waited",
                              {}});
  }
}

void Checker::on_engine_sleep(Session& engine) {
  const auto concerned = [&](const CheckOperation& one) {
    return one.engines.front().get() == &engine;
  };
  for (const auto& operation : operations_) {
    if (concerned(*operation)) operation->cancelled.store(true);
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
                         late->registration->manifest->label() +
                             ": the check waited too long for a refit or for pages",
                         {}});
  }
  return next_deadline();
}

void Checker::cancel(const Error& reason) {
  while (CheckOperation* operation = find_waiting([](const CheckOperation&) { return true; }))
    fail_waiting(*operation, reason);
  for (const auto& operation : operations_) operation->cancelled.store(true);
}

}  // namespace refit::daemon
