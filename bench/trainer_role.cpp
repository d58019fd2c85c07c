// The bench's trainer: holds the source tensors, asks for refits, and times them beside plain
// copies. See roles.hpp.
//
// One thread; the floor's copies run on a team of their own. Maps the engine's memory too, so that
// the floor copies between the very pages that a refit copies between, and so that what arrived can
// be compared.
#include <sched.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <refit/trainer.hpp>
#include <utility>

#include "floor.hpp"
#include "roles.hpp"

namespace refit::bench {
namespace {

using nlohmann::json;

constexpr std::size_t kHugeBytes = std::size_t{2} << 20;

Unexpected os_error(const char* what) {
  return Unexpected(Error{Errc::os, errno, std::string(what) + ": " + std::strerror(errno), {}});
}

/// A mapping of a memfd at a 2 MiB boundary, where huge pages can be mapped as such.
class AlignedMapping {
 public:
  static Result<AlignedMapping> map(int fd, std::size_t bytes, int protection) {
    void* reserved = ::mmap(nullptr, bytes + kHugeBytes, PROT_NONE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (reserved == MAP_FAILED) return os_error("mmap");
    auto* begin = static_cast<std::byte*>(reserved);
    const std::size_t misaligned = reinterpret_cast<std::uintptr_t>(begin) % kHugeBytes;
    std::byte* aligned = begin + (misaligned == 0 ? 0 : kHugeBytes - misaligned);
    AlignedMapping mapping(begin, bytes + kHugeBytes, aligned);
    if (::mmap(aligned, bytes, protection, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
      return os_error("mmap");
    return mapping;
  }
  ~AlignedMapping() {
    if (reserved_ != nullptr) ::munmap(reserved_, reserved_bytes_);
  }
  AlignedMapping(AlignedMapping&& other) noexcept
      : reserved_(std::exchange(other.reserved_, nullptr)),
        reserved_bytes_(other.reserved_bytes_),
        data_(other.data_) {}
  AlignedMapping& operator=(AlignedMapping&& other) noexcept {
    std::swap(reserved_, other.reserved_);
    std::swap(reserved_bytes_, other.reserved_bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  [[nodiscard]] std::byte* data() const noexcept { return data_; }

 private:
  AlignedMapping(void* reserved, std::size_t reserved_bytes, std::byte* data)
      : reserved_(reserved), reserved_bytes_(reserved_bytes), data_(data) {}
  void* reserved_;
  std::size_t reserved_bytes_;
  std::byte* data_;
};

class TrainerRole {
 public:
  explicit TrainerRole(Channel channel) : channel_(std::move(channel)) {}

  int run() {
    while (!quit_) {
      auto message = channel_.receive(std::chrono::milliseconds(-1));
      if (!message) return 1;
      if (!*message) continue;
      json reply;
      int fd = -1;
      if (auto done = handle(**message, reply, fd); !done) {
        reply = error_reply(done.error());
        fd = -1;
      }
      if (!channel_.send(reply, fd)) return 1;
    }
    return 0;
  }

 private:
  Result<void> handle(Message& message, json& reply, int& fd) {
    const json& command = message.body;
    const std::string name = command.at("command").get<std::string>();
    if (name == "allocate") {
      REFIT_TRY(allocate(command));
      fd = holding_.memory->fd();
      return {};
    }
    if (name == "map_target")
      return map_target(std::move(message.fd), command.at("bytes").get<std::size_t>(),
                        command.at("cut").get<bool>());
    if (name == "connect") {
      REFIT_TRY_ASSIGN(const Waiting waiting, waiting_of(command));
      REFIT_TRY_ASSIGN(
          trainer_,
          Trainer::connect("bench-trainer", {command.at("socket").get<std::string>(), waiting},
                           Deadline::in(kCallTimeout)));
      return {};
    }
    if (name == "disconnect") {
      trainer_.reset();
      return {};
    }
    if (name == "register") return register_module(reply);
    if (name == "register_often") return register_often(command.at("times").get<int>(), reply);
    if (name == "register_plain")
      return register_plain(command.at("bytes").get<std::size_t>(), reply);
    if (name == "populate") return populate(reply);
    if (name == "calibrate") return calibrate(command.at("rounds").get<int>(), reply);
    if (name == "pairs") return pairs(command.at("count").get<int>(), reply);
    if (name == "refits") return refits(command.at("count").get<int>(), reply);
    if (name == "change") {
      perturb(holding_.model, holding_.source, ++step_);
      return {};
    }
    if (name == "refit_changed") return refit_changed(reply);
    if (name == "ping")
      return ping(command.at("count").get<int>(), command.at("core").get<int>(), reply);
    if (name == "check") return check(command.at("times").get<int>(), reply);
    if (name == "quit") {
      quit_ = true;
      return {};
    }
    return fail(Errc::bad_argument, "no such command: " + name);
  }

  Result<void> allocate(const json& command) {
    REFIT_TRY_ASSIGN(holding_.model, model_of(command));
    holding_.source.layout = layout_of(holding_.model.source, command.at("cut").get<bool>());
    REFIT_TRY_ASSIGN(holding_.memory,
                     SharedMemory::allocate(holding_.source.layout.bytes, kTensorLabel));
    holding_.source.data = holding_.memory->data();
    fill(holding_.source.data, holding_.source.layout.bytes, /*seed=*/1);
    return {};
  }

  Result<void> map_target(UniqueFd fd, std::size_t bytes, bool cut) {
    REFIT_TRY_ASSIGN(auto mapping, AlignedMapping::map(fd.get(), bytes, PROT_READ | PROT_WRITE));
    if (::madvise(mapping.data(), bytes, MADV_POPULATE_WRITE) != 0)
      return os_error("madvise(MADV_POPULATE_WRITE)");
    target_mapping_ = std::move(mapping);
    target_fd_ = std::move(fd);
    target_bytes_ = bytes;
    holding_.target.layout = layout_of(holding_.model.target, cut);
    holding_.target.data = target_mapping_->data();
    return {};
  }

  Result<ModuleSpec> module_named(const std::string& name) {
    REFIT_TRY_ASSIGN(ModuleSpec module, module_of(name, holding_.model, holding_.model.source,
                                                  holding_.source.layout, holding_.memory));
    module.set_name_map(holding_.model.rules);
    return module;
  }

  Result<void> register_module(json& reply) {
    REFIT_TRY_ASSIGN(const ModuleSpec module, module_named(kModuleName));
    Result<void> registered;
    reply["seconds"] = seconds_of(
        [&] { registered = trainer_->register_module(module, Deadline::in(kCallTimeout)); });
    return registered;
  }

  Result<void> register_often(int times, json& reply) {
    Samples samples;
    for (int i = 0; i < times; ++i) {
      const std::string name = "again-" + std::to_string(i);
      REFIT_TRY_ASSIGN(const ModuleSpec module, module_named(name));
      Result<void> registered;
      samples.push_back(seconds_of(
          [&] { registered = trainer_->register_module(module, Deadline::in(kCallTimeout)); }));
      REFIT_TRY(registered);
      REFIT_TRY(trainer_->unregister_module(name, Deadline::in(kCallTimeout)));
    }
    reply["seconds"] = samples;
    return {};
  }

  /// Registers one tensor in memory whose huge pages were given back and taken again as 4 KiB
  /// pages, beside one MADV_POPULATE_READ of the same pages.
  Result<void> register_plain(std::size_t bytes, json& reply) {
    REFIT_TRY_ASSIGN(const auto memory, SharedMemory::allocate(bytes, kTensorLabel));
    if (::madvise(memory->data(), memory->bytes(), MADV_NOHUGEPAGE) != 0)
      return os_error("madvise(MADV_NOHUGEPAGE)");
    if (::madvise(memory->data(), memory->bytes(), MADV_REMOVE) != 0)
      return os_error("madvise(MADV_REMOVE)");
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
                       populate_fresh(memory->fd(), memory->bytes(), PROT_READ));
      populated_s.push_back(populated);
    }
    reply = {{"register_s", registered_s}, {"madvise_s", populated_s}, {"bytes", memory->bytes()}};
    return {};
  }

  static Result<double> populate_fresh(int fd, std::size_t bytes, int protection) {
    REFIT_TRY_ASSIGN(const auto mapping, AlignedMapping::map(fd, bytes, protection));
    const int advice = (protection & PROT_WRITE) != 0 ? MADV_POPULATE_WRITE : MADV_POPULATE_READ;
    int result = 0;
    const double seconds = seconds_of([&] { result = ::madvise(mapping.data(), bytes, advice); });
    if (result != 0) return os_error("madvise(MADV_POPULATE)");
    return seconds;
  }

  Result<void> populate(json& reply) {
    REFIT_TRY_ASSIGN(const double source,
                     populate_fresh(holding_.memory->fd(), holding_.memory->bytes(), PROT_READ));
    REFIT_TRY_ASSIGN(const double target,
                     populate_fresh(target_fd_.get(), target_bytes_, PROT_READ | PROT_WRITE));
    reply["seconds"] = source + target;
    reply["bytes"] = holding_.memory->bytes() + target_bytes_;
    return {};
  }

  std::size_t floor_bytes() const {
    return std::min({holding_.model.bytes, std::uint64_t{holding_.memory->bytes()},
                     std::uint64_t{target_bytes_}});
  }

  Result<void> calibrate(int rounds, json& reply) {
    if (!team_) team_.emplace();
    const auto calibration =
        team_->calibrate(holding_.target.data, holding_.source.data, floor_bytes(), rounds);
    winner_ = calibration.winner;
    reply = {{"winner", winner_.to_string()}, {"best_s", calibration.best_s}};
    for (const auto& [method, seconds] : calibration.medians_s)
      reply["medians_s"][method] = seconds;
    return {};
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
    if (report->replayed || report->bytes != holding_.model.bytes) {
      return fail(Errc::digest_mismatch, "a refit reported " + std::to_string(report->bytes) +
                                             " bytes of " + std::to_string(holding_.model.bytes));
    }
    return seconds;
  }

  Result<void> compare() {
    const std::uint64_t differing =
        places_that_differ(holding_.model, holding_.source, holding_.target);
    if (differing == 0) return {};
    return fail(Errc::digest_mismatch, std::to_string(differing) + " of " +
                                           std::to_string(places(holding_.model)) +
                                           " sampled places hold other bytes after a refit");
  }

  /// Refits and plain copies in turn, the first of each pair alternating. Before each the source
  /// changes, so that neither finds the bytes already there; after each refit every changed place
  /// is compared. Only the two calls are timed.
  Result<void> pairs(int count, json& reply) {
    Samples refit_s, copy_s;
    for (int i = 0; i < count; ++i) {
      const bool copy_first = (step_ % 4) < 2;
      for (const bool copy : {copy_first, !copy_first}) {
        perturb(holding_.model, holding_.source, ++step_);
        if (copy) {
          copy_s.push_back(
              team_->copy(winner_, holding_.target.data, holding_.source.data, floor_bytes()));
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

  Result<void> refits(int count, json& reply) {
    Samples samples;
    samples.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i) {
      perturb(holding_.model, holding_.source, ++step_);
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
    if (::sched_setaffinity(0, sizeof set, &set) != 0) return os_error("sched_setaffinity");
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
    const std::vector<Sha256> expected = expected_sha256(holding_.model, holding_.source);
    CheckRequest request{kEngineName, kModuleName, DigestKind::raw, {}};
    for (std::size_t i = 0; i < expected.size(); ++i) {
      request.expected.emplace_back(holding_.model.target[i].name, Digest{expected[i], 32});
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
          seconds_of([&] { (void)sha256_stream(holding_.target.data, floor_bytes()); }));
    }
    for (int i = 0; i < 3 * times; ++i) {
      Result<DigestReport> fast;
      xxh3_s.push_back(seconds_of([&] {
        fast = trainer_->digest({kEngineName, kModuleName, DigestKind::xxh3, {}, false},
                                Deadline::in(kCallTimeout));
      }));
      REFIT_TRY(fast);
      read_s.push_back(read_all(holding_.target.data, floor_bytes()));
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
      wanted.emplace_back(holding_.model.target[i].name, Digest{expected[i], 32});
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

  Channel channel_;
  Holding holding_;
  std::optional<AlignedMapping> target_mapping_;
  UniqueFd target_fd_;
  std::size_t target_bytes_ = 0;
  std::optional<Trainer> trainer_;
  std::optional<CopyTeam> team_;
  CopyMethod winner_;
  int stepped_back_ = 0;
  std::uint64_t step_ = 0;
  bool quit_ = false;
};

}  // namespace

int run_trainer(Channel channel) { return TrainerRole(std::move(channel)).run(); }

}  // namespace refit::bench
