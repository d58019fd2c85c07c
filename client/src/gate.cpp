#include "gate.hpp"

#include <algorithm>

#include "digest/digest.hpp"
#include "fence.hpp"
#include "residency_state.hpp"

namespace refit {

Gate::~Gate() {
  go_on();
  fall_silent();
}

void Gate::attach(Regions* session) {
  const std::lock_guard lock(mutex_);
  go_on();
  fall_silent();
  session_ = session;
  answered_epoch_ = 0;
  words_floor_ = 0;
  for (Slot& slot : slots_) slot.index = kNoIndex;
}

void Gate::detach() {
  const std::lock_guard lock(mutex_);
  for (Slot& slot : slots_) {
    slot.held = held_of(slot);
    slot.index = kNoIndex;
  }
  go_on();
  fall_silent();
  session_ = nullptr;
}

void Gate::hold_still() {
  for (const Slot& slot : slots_) {
    if (slot.spec.residency() != nullptr) slot.spec.residency()->state_->freeze();
  }
  holding_.store(true);
}

void Gate::go_on() {
  holding_.store(false);
  for (const Slot& slot : slots_) {
    if (slot.spec.residency() != nullptr) slot.spec.residency()->state_->thaw();
  }
}

void Gate::fall_silent() noexcept {
  for (const Slot& slot : slots_) {
    if (slot.spec.residency() != nullptr) slot.spec.residency()->state_->speak(nullptr);
  }
}

SharedWord<std::uint64_t>* Gate::words_at(std::uint32_t number) const noexcept {
  return session_ == nullptr ? nullptr : session_->request_region().residency + number;
}

Result<std::uint32_t> Gate::free_words(const ModuleSpec& spec) const {
  const auto count = static_cast<std::uint32_t>(spec.layer_buffers().size());
  if (count == 0) return 0;
  const std::lock_guard lock(mutex_);
  // The words of what is registered under this name are in use until it is replaced.
  std::uint32_t first = words_floor_;
  for (std::size_t i = 0; i < slots_.size();) {
    const auto used = slots_[i].index == kNoIndex
                          ? 0
                          : static_cast<std::uint32_t>(slots_[i].spec.layer_buffers().size());
    const bool apart =
        used == 0 || first + count <= slots_[i].words || slots_[i].words + used <= first;
    if (apart) {
      ++i;
      continue;
    }
    first = slots_[i].words + used;
    i = 0;
  }
  if (first + count > kLayerBuffersMax) {
    return fail(Errc::quota, spec.name() + ": " + std::to_string(count) +
                                 " layer buffers; a session has room for " +
                                 std::to_string(kLayerBuffersMax) +
                                 ", those of a module that is replaced included");
  }
  return first;
}

void Gate::put(ModuleSpec spec, std::uint32_t index, std::uint32_t words) {
  const std::lock_guard lock(mutex_);
  if (spec.residency() != nullptr) spec.residency()->state_->speak(words_at(words));
  for (Slot& slot : slots_) {
    if (slot.spec.name() != spec.name()) continue;
    const auto& before = slot.spec.residency();
    if (before != nullptr && before != spec.residency()) before->state_->speak(nullptr);
    slot.spec = std::move(spec);
    slot.index = index;
    slot.words = words;
    slot.held.asleep = false;
    return;
  }
  slots_.push_back({std::move(spec), index, words, {}});
}

void Gate::put_asleep(const std::string& module, std::uint32_t index) {
  const std::lock_guard lock(mutex_);
  for (Slot& slot : slots_) {
    if (slot.spec.name() == module) slot.index = index;
  }
}

void Gate::remove(const std::string& module) {
  const std::lock_guard lock(mutex_);
  std::erase_if(slots_, [&](const Slot& slot) {
    if (slot.spec.name() != module) return false;
    if (slot.spec.residency() != nullptr) slot.spec.residency()->state_->speak(nullptr);
    return true;
  });
}

void Gate::put_in_doubt(ModuleSpec spec, std::uint32_t words) {
  const std::lock_guard lock(mutex_);
  // The daemon may read them as this module's: nobody else may ever speak there.
  words_floor_ =
      std::max(words_floor_, words + static_cast<std::uint32_t>(spec.layer_buffers().size()));
  for (Slot& slot : slots_) {
    if (slot.spec.name() != spec.name()) continue;
    if (slot.index == kNoIndex) slot.index = kInDoubt;
    return;
  }
  slots_.push_back({std::move(spec), kInDoubt, words, {}});
}

HeldState Gate::held(const std::string& module) const {
  const std::lock_guard lock(mutex_);
  const Slot* slot = find(module);
  return slot == nullptr ? HeldState{} : held_of(*slot);
}

std::vector<ModuleSpec> Gate::specs() const {
  const std::lock_guard lock(mutex_);
  std::vector<ModuleSpec> specs;
  for (const Slot& slot : slots_) specs.push_back(slot.spec);
  return specs;
}

void Gate::fall_asleep() {
  const std::lock_guard lock(mutex_);
  fall_silent();
  for (Slot& slot : slots_) {
    slot.held = held_of(slot);
    slot.held.asleep = true;
    slot.spec = ModuleSpec(slot.spec.name());
  }
  asleep_.store(true);
}

const ModuleBlock* Gate::block(const Slot& slot) const noexcept {
  if (session_ == nullptr) return nullptr;
  if (slot.index == kInDoubt) return block_of(slot.spec.name());
  if (slot.index >= kModulesMax) return nullptr;
  return &session_->response_region().modules[slot.index];
}

/// The words that the daemon gave this module, if it registered it.
const ModuleBlock* Gate::block_of(const std::string& module) const noexcept {
  const std::uint64_t name = payload_hash(module.data(), module.size());
  for (const ModuleBlock& words : session_->response_region().modules) {
    if (ModuleWord::unpack(words.word.load()).state != ModuleState::none &&
        words.name.load() == name)
      return &words;
  }
  return nullptr;
}

ModuleState Gate::state_of(const Slot& slot) const noexcept {
  if (const ModuleBlock* words = block(slot)) {
    const ModuleState state = ModuleWord::unpack(words->word.load()).state;
    if (state != ModuleState::none) return state;
  }
  if (slot.held.poisoned) return ModuleState::poisoned;
  return slot.held.version == 0 ? ModuleState::initial : ModuleState::committed;
}

HeldState Gate::held_of(const Slot& slot) const noexcept {
  const ModuleBlock* words = block(slot);
  if (words == nullptr) return slot.held;
  const ModuleReading reading = read_module(*words);
  switch (reading.word.state) {
    case ModuleState::writing:
    case ModuleState::poisoned:
      // The record of an unfinished write names the version that the bytes never became. The one
      // before it may have been committed without this side having seen it.
      return {std::max(slot.held.version,
                       reading.version - std::min<std::uint64_t>(1, reading.version)),
              reading.transaction, true, reading.selection, slot.held.asleep};
    case ModuleState::initial:
    case ModuleState::committed:
      return {reading.version, reading.transaction, false, reading.selection, slot.held.asleep};
    case ModuleState::none:
      break;
  }
  return slot.held;
}

const Gate::Slot* Gate::find(const std::string& module) const noexcept {
  for (const Slot& slot : slots_) {
    if (slot.spec.name() == module) return &slot;
  }
  return nullptr;
}

std::uint64_t Gate::asked_epoch() const noexcept {
  if (session_ == nullptr) return 0;
  const GateWord gate = GateWord::unpack(session_->response_region().gate.load());
  return gate.state == GateState::prepare && gate.epoch > answered_epoch_ ? gate.epoch : 0;
}

bool Gate::due() const noexcept {
  if (session_ == nullptr) return false;
  const GateWord gate = GateWord::unpack(session_->response_region().gate.load());
  if (holding_.load()) return gate.epoch != answered_epoch_ || gate.state != GateState::prepare;
  return gate.state == GateState::prepare && gate.epoch > answered_epoch_;
}

bool Gate::long_copy() const noexcept {
  return session_ != nullptr && (GateWord::unpack(session_->response_region().gate.load()).flags &
                                 GateWord::kLongCopy) != 0;
}

Gate::Progress Gate::pump() {
  if (session_ == nullptr) return Progress::idle;
  const GateWord gate = GateWord::unpack(session_->response_region().gate.load());
  if (holding_.load()) {
    if (gate.epoch == answered_epoch_ && gate.state == GateState::prepare) return Progress::holding;
    release();
    return Progress::released;
  }
  if (gate.state != GateState::prepare || gate.epoch <= answered_epoch_) return Progress::idle;
  answered_epoch_ = gate.epoch;
  answered_flags_ = gate.flags;
  hold_still();
  for (const Slot& slot : slots_) {
    if (mark_end_of_work(slot.spec)) continue;
    // Nobody could order the copy behind this engine's work.
    go_on();
    refuse(gate.epoch);
    return Progress::idle;
  }
  // Pairs with the daemon's load in Transaction::all_ready.
  session_->request_region().gate_answer.store(AnswerWord{gate.epoch, AnswerState::ready}.pack());
  session_->ring_daemon();
  return Progress::holding;
}

void Gate::release() {
  const std::lock_guard lock(mutex_);
  // An event that nobody took yet is added to, not lost: a bound engine may be refit several times
  // between two polls.
  GateEvent event = event_ ? std::move(*event_) : GateEvent{};
  bool any = event_.has_value();
  for (Slot& slot : slots_) {
    const ModuleBlock* words = block(slot);
    if (words == nullptr) continue;
    const ModuleReading reading = read_module(*words);
    if (reading.word.state != ModuleState::committed || reading.word.epoch != answered_epoch_)
      continue;
    std::erase_if(event.modules,
                  [&](const auto& module) { return module.name == slot.spec.name(); });
    event.modules.push_back({slot.spec.name(), reading.version, reading.transaction});
    // The daemon's gate word may speak of the next refit already, hence the flags of the answer.
    event.reset_caches = event.reset_caches || (answered_flags_ & GateWord::kResetCaches) != 0;
    slot.held = {reading.version, reading.transaction, false, reading.selection};
    any = true;
  }
  go_on();
  if (any) event_ = std::move(event);
}

void Gate::leave() {
  if (!holding_.load()) return;
  for (const Slot& slot : slots_) settle_devices(slot.spec);
  release();
}

bool Gate::withdraw() {
  if (session_ == nullptr || !holding_.load()) return true;
  // Store, then load: the daemon stores `writing` and then loads this word, so at least one of the
  // two sees the other and steps back. Pairs with Transaction::begin_writing.
  session_->request_region().gate_answer.store(
      AnswerWord{answered_epoch_, AnswerState::withdrawn}.pack());
  if (any_word_is_writing()) return false;
  // A whole refit may have come and gone between the caller's last look and the store: its event
  // counts.
  release();
  session_->ring_daemon();
  return true;
}

void Gate::refuse(std::uint64_t epoch) noexcept {
  if (session_ == nullptr) return;
  answered_epoch_ = epoch;
  session_->request_region().gate_answer.store(AnswerWord{epoch, AnswerState::withdrawn}.pack());
  session_->ring_daemon();
}

/// All blocks, not only those that this side knows: a registration whose call timed out may have
/// been done.
bool Gate::any_word_is_writing() const noexcept {
  if (session_ == nullptr) return false;
  for (const ModuleBlock& words : session_->response_region().modules) {
    if (ModuleWord::unpack(words.word.load()).state == ModuleState::writing) return true;
  }
  return false;
}

std::optional<GateEvent> Gate::take_event() {
  std::optional<GateEvent> event = std::move(event_);
  event_.reset();
  return event;
}

bool Gate::step_allowed() const {
  if (holding_.load() || asleep_.load()) return false;
  const std::lock_guard lock(mutex_);
  if (any_word_is_writing()) return false;
  return std::all_of(slots_.begin(), slots_.end(), [this](const Slot& slot) {
    const ModuleState now = state_of(slot);
    return now != ModuleState::writing && now != ModuleState::poisoned;
  });
}

ModuleState Gate::state(const std::string& module) const {
  const std::lock_guard lock(mutex_);
  const Slot* slot = find(module);
  return slot == nullptr ? ModuleState::none : state_of(*slot);
}

std::uint64_t Gate::version(const std::string& module) const {
  const std::lock_guard lock(mutex_);
  const Slot* slot = find(module);
  return slot == nullptr ? 0 : held_of(*slot).version;
}

}  // namespace refit
