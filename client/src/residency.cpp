#include "refit/residency.hpp"

#include <string>
#include <utility>

#include "residency_state.hpp"

namespace refit {

Residency::Residency() : state_(std::make_shared<State>()) {}
Residency::~Residency() = default;

Residency::Move Residency::move() { return Move(state_); }

Residency::Move::Move(std::shared_ptr<State> state) : state_(std::move(state)) {
  state_->begin_move();
}
Residency::Move::~Move() {
  if (state_ != nullptr) state_->end_move();  // null: moved from
}
void Residency::Move::absent(std::uint32_t buffer) { state_->set_absent(buffer); }
Result<void> Residency::Move::resident(std::uint32_t buffer, const void* address) {
  return state_->set_resident(buffer, address);
}

void Residency::State::begin_move() {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return !frozen_; });
  ++moving_;
}

void Residency::State::end_move() {
  const std::lock_guard lock(mutex_);
  --moving_;
  changed_.notify_all();
}

void Residency::State::freeze() {
  std::unique_lock lock(mutex_);
  frozen_ = true;
  changed_.wait(lock, [this] { return moving_ == 0; });
}

void Residency::State::thaw() {
  const std::lock_guard lock(mutex_);
  frozen_ = false;
  changed_.notify_all();
}

/// The bytes of a place that is given up are overwritten only after its word is gone: on x86-64 a
/// sequentially consistent store is a full barrier. Pairs with the two loads around a digest in the
/// daemon's Checker.
void Residency::State::set(std::size_t buffer, ResidencyState state, std::uint32_t region,
                           std::uint64_t offset) {
  ResidencyWord& word = buffers_[buffer].word;
  word = {state, static_cast<std::uint8_t>(region), static_cast<std::uint16_t>(word.generation + 1),
          offset};
  if (words_ != nullptr) words_[buffer].store(word.pack());
}

void Residency::State::set_absent(std::uint32_t buffer) {
  const std::lock_guard lock(mutex_);
  if (buffer < buffers_.size()) set(buffer, ResidencyState::absent, 0, 0);
}

Result<void> Residency::State::set_resident(std::uint32_t buffer, const void* address) {
  const std::lock_guard lock(mutex_);
  const auto refuse = [&](const char* what) {
    return fail(Errc::bad_region, "layer buffer " + std::to_string(buffer) + ": " + what);
  };
  if (buffer >= buffers_.size()) return refuse("the module has no such buffer");
  for (const Pool& pool : pools_) {
    if (!pool.memory->contains(address, buffers_[buffer].bytes)) continue;
    const auto offset =
        static_cast<std::uint64_t>(static_cast<const std::byte*>(address) - pool.memory->data());
    if (offset % ResidencyWord::kAlignBytes != 0) return refuse("its place is not 32-byte aligned");
    if (offset > ResidencyWord::kOffsetMax) return refuse("its place is beyond 1 TiB of its pool");
    set(buffer, ResidencyState::resident, pool.region, offset);
    return {};
  }
  return refuse("its place is not inside a pool of the module");
}

void Residency::State::add_buffer(std::uint64_t bytes) {
  const std::lock_guard lock(mutex_);
  buffers_.push_back({bytes, {ResidencyState::absent, 0, 0, 0}});
}

void Residency::State::add_pool(std::uint32_t region, std::shared_ptr<Memory> memory) {
  const std::lock_guard lock(mutex_);
  pools_.push_back({region, std::move(memory)});
}

void Residency::State::speak(SharedWord<std::uint64_t>* words) {
  const std::lock_guard lock(mutex_);
  SharedWord<std::uint64_t>* before = std::exchange(words_, words);
  for (std::size_t i = 0; i < buffers_.size(); ++i) {
    if (words != nullptr) words[i].store(buffers_[i].word.pack());
    if (before != nullptr && before != words) before[i].store(ResidencyWord{}.pack());
  }
}

}  // namespace refit
