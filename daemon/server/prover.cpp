#include "server/prover.hpp"

#include <pthread.h>
#include <sys/resource.h>

#include <algorithm>
#include <string>
#include <utility>

#include "ipc/state_word.hpp"
#include "log.hpp"
#include "server/hashing.hpp"
#include "server/racing_reads.hpp"

namespace refit::daemon {
namespace {

/// A proof begins when no other refit of the module came for so long: a burst of small ones costs
/// nobody a wake-up.
constexpr std::chrono::milliseconds kQuiet{10};

ProofResult result_of(EndComparer::Answer answer) {
  switch (answer) {
    case EndComparer::Answer::equal:
      return ProofResult::equal;
    case EndComparer::Answer::different:
      return ProofResult::different;
    case EndComparer::Answer::unreadable:
      return ProofResult::unreadable;
    case EndComparer::Answer::stopped:
      break;
  }
  return ProofResult::overtaken;
}

}  // namespace

Prover::Prover(unsigned threads, CompletionQueue& completions, DeviceAccess& devices,
               Statistics& statistics)
    : completions_(completions), devices_(devices), statistics_(statistics) {
  queue_.reserve(64);
  for (unsigned i = 0; i < threads; ++i) {
    threads_.emplace_back([this] { serve(); });
    ::pthread_setname_np(threads_.back().native_handle(),
                         ("refit-proof-" + std::to_string(i)).c_str());
  }
}

Prover::~Prover() { stop(); }

void Prover::stop() {
  {
    const std::lock_guard lock(mutex_);
    stopping_ = true;
    for (const auto& entry : entries_) entry->given_up.store(true);
  }
  work_.notify_all();
  quiet_.notify_all();
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
  for (const auto& entry : entries_) entry->wanted = {};
}

Prover::Entry& Prover::entry_of(const std::shared_ptr<Module>& module) {
  Entry* free = nullptr;
  for (const auto& entry : entries_) {
    const auto held = entry->module.lock();
    if (held == module) return *entry;
    if (held == nullptr && !entry->queued && !entry->busy && !entry->reported) free = entry.get();
  }
  if (free == nullptr) {
    entries_.push_back(std::make_unique<Entry>(*this));
    free = entries_.back().get();
    free->run = [](Completion& self) {
      auto& entry = static_cast<Entry&>(self);
      entry.owner.found(entry);
    };
  }
  free->module = module;
  return *free;
}

void Prover::committed(const Session& engine, const std::shared_ptr<Module>& module,
                       const std::shared_ptr<BoundPlan>& plan,
                       const std::shared_ptr<const Expected>& expected) {
  if (threads_.empty()) return;
  const ModuleReading reading = read_module(engine.memory->response_region().modules[module->slot]);
  Commit previous;  // let go of behind the lock
  const std::lock_guard lock(mutex_);
  Entry& entry = entry_of(module);
  previous = std::exchange(entry.wanted, {plan, expected, engine.memory, module->slot,
                                          reading.word.pack(), reading.version, Clock::now()});
  // A thread that is at it finds the new one when it is through.
  if (!entry.queued && !entry.busy) enqueue(entry);
}

void Prover::enqueue(Entry& entry) {
  entry.queued = true;
  queue_.push_back(&entry);
  work_.notify_one();
}

void Prover::forget(const Registration& registration) {
  const std::lock_guard lock(mutex_);
  for (const auto& entry : entries_) {
    if (entry->wanted.uses(registration)) entry->wanted = {};
    if (entry->busy && entry->proving.uses(registration)) entry->given_up.store(true);
  }
}

void Prover::serve() {
  // Of this thread alone, as nice values are on Linux. The idle class would be starved on a busy
  // host also while it ends, and nobody learns of a daemon's death before its last thread ended.
  constexpr int kNice = 10;
  ::setpriority(PRIO_PROCESS, 0, kNice);
  EndComparer comparer(devices_);
  std::unique_lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    Entry& entry = *queue_.front();
    queue_.erase(queue_.begin());
    while (!stopping_ && Clock::now() < entry.wanted.at + kQuiet)
      quiet_.wait_until(lock, entry.wanted.at + kQuiet);
    entry.queued = false;
    entry.proving = std::exchange(entry.wanted, {});
    if (stopping_ || entry.proving.plan == nullptr) continue;
    entry.busy = true;
    entry.given_up.store(false);
    lock.unlock();
    Finding finding = prove(entry, comparer);
    lock.lock();
    Commit done = std::exchange(entry.proving, {});
    entry.busy = false;
    entry.finding = std::move(finding);
    if (!std::exchange(entry.reported, true)) completions_.push(entry);
    if (entry.wanted.plan != nullptr && !stopping_) enqueue(entry);
    // It may hold the last of a client's memory.
    lock.unlock();
    done = {};
    lock.lock();
  }
}

Prover::Finding Prover::prove(const Entry& entry, EndComparer& comparer) {
  const Commit& commit = entry.proving;
  const auto stands = [&] { return !entry.given_up.load() && commit.stands(); };
  Finding finding{ProofResult::equal,
                  commit.version,
                  commit.plan->target->generation,
                  commit.plan->plan.whole,
                  commit.engine,
                  commit.slot,
                  commit.word,
                  {}};
  if (commit.expected != nullptr) finding.result = hash(commit, stands, finding.wrong);
  const bool decided = commit.expected != nullptr && commit.expected->complete;
  if (finding.result == ProofResult::equal && !decided) {
    const RequestRegion& engine = commit.engine->request_region();
    finding.result = result_of(comparer.compare(*commit.plan, engine, stands));
  }
  if (!stands()) finding.result = ProofResult::overtaken;
  return finding;
}

/// Hashes what the trainer gave digests of, layers in both of their places. The answer is worth
/// something only if the commit still stands behind it.
ProofResult Prover::hash(const Commit& commit, const std::function<bool()>& stands,
                         std::vector<std::string>& wrong) {
  const Expected& expected = *commit.expected;
  Hashing hashing;
  hashing.registration = commit.plan->target;
  hashing.session = commit.engine;
  hashing.kind = expected.kind;
  hashing.tensors = expected.tensors;
  hashing.host_count = expected.tensors.size();
  std::vector<Digest> wanted = expected.digests;
  for (std::size_t i = 0; i < expected.tensors.size(); ++i) {
    if (expected.tensors[i]->layer_buffer == kNoLayerBuffer) continue;
    hashing.tensors.push_back(expected.tensors[i]);
    wanted.push_back(expected.digests[i]);
  }
  bool read = true;
  const auto job = HashJob::make(hashing, devices_, /*threads=*/1,
                                 [&read](const std::optional<Error>& error) { read = !error; });
  for (std::size_t part = 0; part < job->part_count(); ++part) {
    if (!stands()) return ProofResult::overtaken;
    const RacingReads racing;
    job->run_part(part);
  }
  job->finished();
  if (!read) return ProofResult::unreadable;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    const bool on_device = i >= hashing.host_count;
    const bool absent = on_device && hashing.digests[i].length == 0;
    if (absent || hashing.digests[i] == wanted[i]) continue;
    wrong.push_back(hashing.tensors[i]->name + (on_device ? " (device place)" : ""));
  }
  std::sort(wrong.begin(), wrong.end());
  return wrong.empty() ? ProofResult::equal : ProofResult::refuted;
}

/// The engine's next look at the word stops it.
void Prover::poison(const Finding& finding, const Module& module) {
  SharedWord<std::uint64_t>& state = finding.engine->response_region().modules[finding.slot].word;
  if (state.load() != finding.word) return;  // a refit writes it anew
  ModuleWord word = ModuleWord::unpack(finding.word);
  word.state = ModuleState::poisoned;
  state.store(word.pack());
  constexpr std::size_t kNamed = 8;
  std::string names;
  for (std::size_t i = 0; i < std::min(kNamed, finding.wrong.size()); ++i)
    names += (names.empty() ? "" : ", ") + finding.wrong[i];
  if (finding.wrong.size() > kNamed)
    names += " and " + std::to_string(finding.wrong.size() - kNamed) + " more";
  LogFields fields;
  fields.module = module.name;
  fields.errc = Errc::poisoned;
  log(LogEvent::proof_refuted,
      module.registration->manifest->label() + ", version " + std::to_string(finding.version) +
          ": the live bytes of " + names +
          " have not the SHA-256 that came with the refit; the module is poisoned until all of it "
          "is refitted",
      fields);
}

/// A refit of some tensors proves a version only on top of the one before.
void Prover::found(Entry& entry) {
  Finding finding;
  {
    const std::lock_guard lock(mutex_);
    finding = std::exchange(entry.finding, {});
    entry.reported = false;
  }
  statistics_.proved(finding.result);
  const auto module = entry.module.lock();
  if (module == nullptr || module->registration->generation != finding.generation) return;
  if (finding.result == ProofResult::refuted) poison(finding, *module);
  if (finding.result != ProofResult::equal) return;
  std::optional<Proof>& proof = module->registration->proof;
  if (proof && finding.version < proof->version) return;
  if (!finding.whole && (!proof || proof->version + 1 < finding.version)) return;
  proof = Proof{finding.version, Clock::now()};
}

}  // namespace refit::daemon
