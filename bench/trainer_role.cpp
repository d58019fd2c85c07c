// The bench's trainer: holds the source tensors, asks for refits, and times them beside plain
// copies. See roles.hpp.
//
// One thread; the floor's copies on host memory run on a team of their own. Maps the engine's
// memory too, so that the floor copies between the very bytes that a refit copies between, and so
// that what arrived can be compared.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <refit/trainer.hpp>
#include <utility>

#include "floor.hpp"
#include "host_storage.hpp"
#include "roles.hpp"

namespace refit::bench {
namespace {

using nlohmann::json;

class TrainerRole final : public Role {
 public:
  explicit TrainerRole(Channel channel) : Role(std::move(channel), /*filled_with=*/1) {
    on("map_target", [this](Message& command, Reply&) { return map_target(command); });
    on("register_plain", [this](Message& command, Reply& reply) {
      return register_plain(command.body.at("bytes").get<std::size_t>(), reply.body);
    });
    on("populate", [this](Message&, Reply& reply) { return populate(reply.body); });
    on("calibrate", [this](Message& command, Reply& reply) {
      return calibrate(command.body.at("rounds").get<int>(), reply.body);
    });
    on("pairs", [this](Message& command, Reply& reply) {
      return pairs(command.body.at("count").get<int>(), reply.body);
    });
    on("copy", [this](Message&, Reply& reply) { return copy(reply.body); });
    on("refits", [this](Message& command, Reply& reply) {
      return refits(command.body.at("count").get<int>(), reply.body);
    });
    on("change", [this](Message&, Reply&) { return change(); });
    on("refit_changed", [this](Message&, Reply& reply) { return refit_changed(reply.body); });
    on("ping", [this](Message& command, Reply& reply) {
      return ping(command.body.at("count").get<int>(), command.body.at("core").get<int>(),
                  reply.body);
    });
    on("check", [this](Message& command, Reply& reply) {
      return check(command.body.at("times").get<int>(), reply.body);
    });
  }

  int run() {
    while (serve(std::chrono::milliseconds(-1))) {
    }
    return status();
  }

 private:
  Result<std::unique_ptr<Storage>> allocate() override {
    return kind().source(side_of(model().source));
  }
  Result<ModuleSpec> module_in(const Storage& storage, const std::string& name) override {
    REFIT_TRY_ASSIGN(ModuleSpec module, storage.module(name));
    module.set_name_map(model().rules);
    return module;
  }
  Result<void> connect(const ConnectOptions& options) override {
    REFIT_TRY_ASSIGN(trainer_,
                     Trainer::connect("bench-trainer", options, Deadline::in(kCallTimeout)));
    return {};
  }
  void disconnect() override { trainer_.reset(); }
  Result<void> register_module(const ModuleSpec& module) override {
    return trainer_->register_module(module, Deadline::in(kCallTimeout));
  }
  Result<void> unregister_module(const std::string& module) override {
    return trainer_->unregister_module(module, Deadline::in(kCallTimeout));
  }

  Result<void> map_target(Message& command) {
    REFIT_TRY_ASSIGN(target_, kind().map_target(side_of(model().target), command.body.at("address"),
                                                std::move(command.fd)));
    return {};
  }

  /// Registers one tensor in memory whose huge pages were given back and taken again as 4 KiB
  /// pages, beside one MADV_POPULATE_READ of the same pages.
  Result<void> register_plain(std::size_t bytes, json& reply) {
    REFIT_TRY_ASSIGN(const auto memory, SharedMemory::allocate(bytes, kTensorLabel));
    if (::madvise(memory->data(), memory->bytes(), MADV_NOHUGEPAGE) != 0)
      return fail_os("madvise(MADV_NOHUGEPAGE)", errno);
    if (::madvise(memory->data(), memory->bytes(), MADV_REMOVE) != 0)
      return fail_os("madvise(MADV_REMOVE)", errno);
    fill(memory->data(), memory->bytes(), /*seed=*/3);
    Samples registered_s, populated_s;
    for (int i = 0; i < 5; ++i) {
      const std::string name = "plain-" + std::to_string(i);
      ModuleSpec module(name);
      REFIT_TRY(module.add("tensor", DType::uint8, {memory->bytes()}, memory, memory->data()));
      Result<void> registered;
      registered_s.push_back(seconds_of(
          [&] { registered = trainer_->register_module(module, Deadline::in(kCallTimeout)); }));
      REFIT_TRY(registered);
      REFIT_TRY(trainer_->unregister_module(name, Deadline::in(kCallTimeout)));
      REFIT_TRY_ASSIGN(const double populated,
                       bench::populate_fresh(memory->fd(), memory->bytes(), PROT_READ));
      populated_s.push_back(populated);
    }
    reply = {{"register_s", registered_s}, {"madvise_s", populated_s}, {"bytes", memory->bytes()}};
    return {};
  }

  Result<void> populate(json& reply) {
    REFIT_TRY_ASSIGN(const auto source, own().populate_fresh(PROT_READ));
    REFIT_TRY_ASSIGN(const auto target, target_->populate_fresh(PROT_READ | PROT_WRITE));
    reply["seconds"] = source.first + target.first;
    reply["bytes"] = source.second + target.second;
    return {};
  }

  Result<void> calibrate(int rounds, json& reply) {
    if (floor_ == nullptr) {
      REFIT_TRY_ASSIGN(floor_, target_->floor_from(own(), model().bytes));
    }
    REFIT_TRY_ASSIGN(const Floor::Calibration calibration, floor_->calibrate(rounds));
    reply = {{"winner", calibration.winner}, {"best_s", calibration.best_s}};
    for (const auto& [method, seconds] : calibration.medians_s)
      reply["medians_s"][method] = seconds;
    return {};
  }

  /// Other bytes in the source, so that neither a refit nor a copy finds them already there.
  Result<void> change() {
    perturb(model(), own().view(), ++step_);
    return own().write();
  }

  Result<double> timed_refit() {
    static const RefitTarget target{kEngineName, kModuleName, kModuleName, {}, false};
    const Deadline deadline = Deadline::in(kCallTimeout);
    const auto begin = std::chrono::steady_clock::now();
    auto report = trainer_->refit(target, deadline);
    // The bench's engine leaves its gate now and then to look for a command, and may step back from
    // a refit that began just then. What that costs is part of the time, and how often it happened
    // is reported.
    while (!report && report.error().code == Errc::engine_not_ready && !deadline.passed()) {
      ++stepped_back_;
      report = trainer_->refit(target, deadline);
    }
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    if (!report) return Unexpected(std::move(report).error());
    if (report->replayed || report->bytes != model().bytes) {
      return fail(Errc::digest_mismatch, "a refit reported " + std::to_string(report->bytes) +
                                             " bytes of " + std::to_string(model().bytes));
    }
    return seconds;
  }

  Result<void> compare() {
    REFIT_TRY(target_->read());
    const std::uint64_t differing = places_that_differ(model(), own().view(), target_->view());
    if (differing == 0) return {};
    return fail(Errc::digest_mismatch, std::to_string(differing) + " of " +
                                           std::to_string(places(model())) +
                                           " sampled places hold other bytes after a refit");
  }

  /// Refits and plain copies in turn, the first of each pair alternating. Before each the source
  /// changes; after each refit every changed place is compared. Only the two calls are timed.
  Result<void> pairs(int count, json& reply) {
    Samples refit_s, copy_s;
    for (int i = 0; i < count; ++i) {
      const bool copy_first = (step_ % 4) < 2;
      for (const bool copy : {copy_first, !copy_first}) {
        REFIT_TRY(change());
        if (copy) {
          REFIT_TRY_ASSIGN(const double seconds, floor_->copy());
          copy_s.push_back(seconds);
        } else {
          REFIT_TRY_ASSIGN(const double seconds, timed_refit());
          refit_s.push_back(seconds);
          REFIT_TRY(compare());
        }
      }
    }
    reply = {{"refit_s", refit_s}, {"memcpy_s", copy_s}, {"stepped_back", stepped_back_}};
    return {};
  }

  Result<void> copy(json& reply) {
    REFIT_TRY(change());
    REFIT_TRY_ASSIGN(reply["seconds"], floor_->copy());
    return {};
  }

  Result<void> refits(int count, json& reply) {
    Samples samples;
    samples.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      REFIT_TRY(change());
      REFIT_TRY_ASSIGN(const double seconds, timed_refit());
      samples.push_back(seconds);
    }
    REFIT_TRY(compare());
    reply = {{"seconds", samples}, {"stepped_back", stepped_back_}};
    return {};
  }

  /// One refit of what "change" changed, and when it ended by the clock that all processes share.
  Result<void> refit_changed(json& reply) {
    REFIT_TRY_ASSIGN(const double seconds, timed_refit());
    reply["ended_ns"] =
        std::chrono::nanoseconds(std::chrono::steady_clock::now().time_since_epoch()).count();
    reply["seconds"] = seconds;
    return compare();
  }

  Result<void> ping(int count, int core, json& reply) {
    const cpu_set_t set = only_core(core);
    if (::sched_setaffinity(0, sizeof set, &set) != 0) return fail_os("sched_setaffinity", errno);
    Samples samples;
    samples.reserve(static_cast<std::size_t>(count));
    const Deadline deadline = Deadline::in(kCallTimeout);
    for (int i = -count / 10; i < count; ++i) {
      Result<void> answered;
      const double seconds = seconds_of([&] { answered = trainer_->ping(deadline); });
      REFIT_TRY(answered);
      if (i >= 0) samples.push_back(seconds);
    }
    reply["seconds"] = samples;
    return {};
  }

  /// The ring's check and the ring's digests against hashes of the source that OpenSSL computed
  /// here; one OpenSSL stream over the target's pages, and a reading of them beside XXH3 of them.
  Result<void> check(int times, json& reply) {
    const std::vector<Sha256> expected = expected_sha256(model(), own().view());
    CheckRequest request{kEngineName, kModuleName, DigestKind::raw, {}};
    for (std::size_t i = 0; i < expected.size(); ++i) {
      request.expected.emplace_back(model().target[i].name, Digest{expected[i], 32});
    }
    Samples check_s, stream_s, xxh3_s, read_s;
    for (int i = 0; i < times; ++i) {
      std::optional<Result<CheckReport>> report;
      check_s.push_back(
          seconds_of([&] { report = trainer_->check(request, Deadline::in(kCallTimeout)); }));
      if (!*report) return Unexpected(std::move(*report).error());
      if (!(*report)->ok() || (*report)->verified != expected.size()) {
        return fail(Errc::digest_mismatch,
                    "the check verified " + std::to_string((*report)->verified) + " of " +
                        std::to_string(expected.size()) + " tensors; mismatched " +
                        std::to_string((*report)->mismatched.size()) + ", missing " +
                        std::to_string((*report)->missing.size()),
                    (*report)->mismatched);
      }
      stream_s.push_back(
          seconds_of([&] { (void)sha256_stream(target_->view().data, model().bytes); }));
    }
    for (int i = 0; i < 3 * times; ++i) {
      Result<DigestReport> fast;
      xxh3_s.push_back(seconds_of([&] {
        fast = trainer_->digest({kEngineName, kModuleName, DigestKind::xxh3, {}, false},
                                Deadline::in(kCallTimeout));
      }));
      REFIT_TRY(fast);
      read_s.push_back(read_all(target_->view().data, model().bytes));
    }
    REFIT_TRY(compare_digests(expected));
    REFIT_TRY(prove_check_can_fail(request));
    reply = {{"check_s", check_s},
             {"stream_s", stream_s},
             {"xxh3_s", xxh3_s},
             {"read_s", read_s},
             {"verified", expected.size()}};
    return {};
  }

  Result<void> compare_digests(const std::vector<Sha256>& expected) {
    REFIT_TRY_ASSIGN(const DigestReport report,
                     trainer_->digest({kEngineName, kModuleName, DigestKind::raw, {}, false},
                                      Deadline::in(kCallTimeout)));
    std::vector<NamedDigest> wanted;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      wanted.emplace_back(model().target[i].name, Digest{expected[i], 32});
    }
    std::sort(wanted.begin(), wanted.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
    if (report.tensors == wanted) return {};
    return fail(Errc::digest_mismatch,
                "digests read through the ring differ from those of the trainer's tensors");
  }

  /// A checker that verifies anything proves nothing.
  Result<void> prove_check_can_fail(CheckRequest request) {
    request.expected.resize(1);
    request.expected.front().second.bytes[0] ^= 1;
    REFIT_TRY_ASSIGN(const CheckReport report,
                     trainer_->check(request, Deadline::in(kCallTimeout)));
    if (!report.ok() && report.mismatched.size() == 1) return {};
    return fail(Errc::digest_mismatch, "the check accepted a digest that is wrong on purpose");
  }

  std::unique_ptr<Storage> target_;  ///< the engine's, as it is reached from here
  std::unique_ptr<Floor> floor_;
  std::optional<Trainer> trainer_;
  int stepped_back_ = 0;
  std::uint64_t step_ = 0;
};

}  // namespace

int run_trainer(Channel channel) { return TrainerRole(std::move(channel)).run(); }

}  // namespace refit::bench
