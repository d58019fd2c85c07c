// The ring: single producer, single consumer, fixed-size descriptors, 64-bit absolute positions.
//
// One instance of each class per direction and process; each belongs to one thread. Positions never
// wrap in practice, so there is no ABA; one store of the position publishes. The peer's position is
// read once per call and checked: a value that the protocol cannot produce is reported and never
// used.
#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>

#include "ipc/shared_layout.hpp"

namespace refit {

class RingProducer {
 public:
  /// @param tail   this side's position, in the region that this side writes.
  /// @param head   the peer's position, in the region that the peer writes.
  RingProducer(SharedWord<std::uint64_t>& tail, const SharedWord<std::uint64_t>& head,
               Descriptor* slots) noexcept
      : tail_(&tail), head_(&head), slots_(slots), position_(tail.load()) {}

  enum class Push { ok, full, peer_broke_protocol };

  Push push(const Descriptor& descriptor) noexcept {
    const std::uint64_t head = head_->load();  // pairs with the store in RingConsumer::advance
    if (head > position_) return Push::peer_broke_protocol;
    if (position_ - head >= kRingSlots) return Push::full;
    slots_[position_ % kRingSlots] = descriptor;
    tail_->store(++position_);  // publishes the slot; pairs with the load in RingConsumer::peek
    return Push::ok;
  }

  /// Position that the next push gets.
  [[nodiscard]] std::uint64_t position() const noexcept { return position_; }
  /// How far the peer has consumed, clamped to what was produced.
  [[nodiscard]] std::uint64_t consumed() const noexcept {
    const std::uint64_t head = head_->load();
    return head > position_ ? position_ : head;
  }

 private:
  SharedWord<std::uint64_t>* tail_;
  const SharedWord<std::uint64_t>* head_;
  Descriptor* slots_;
  std::uint64_t position_;
};

class RingConsumer {
 public:
  RingConsumer(const SharedWord<std::uint64_t>& tail, SharedWord<std::uint64_t>& head,
               const Descriptor* slots) noexcept
      : tail_(&tail), head_(&head), slots_(slots), position_(head.load()) {}

  enum class Peek { empty, message, peer_broke_protocol };

  /// Copies the next descriptor out. The slot stays the consumer's until advance().
  Peek peek(Descriptor& out) const noexcept {
    const std::uint64_t tail = tail_->load();  // pairs with the store in RingProducer::push
    if (tail == position_) return Peek::empty;
    if (tail < position_ || tail - position_ > kRingSlots) return Peek::peer_broke_protocol;
    read_once(slots_[position_ % kRingSlots], out);
    return Peek::message;
  }

  [[nodiscard]] bool empty() const noexcept { return tail_->load() == position_; }

  /// Gives the slot and its payload back to the producer.
  void advance() noexcept {
    head_->store(++position_);
  }  // pairs with the load in RingProducer::push

 private:
  /// Every word of the slot is read exactly once, whatever the peer does to it meanwhile.
  static void read_once(const Descriptor& slot, Descriptor& out) noexcept {
    std::uint64_t words[sizeof(Descriptor) / sizeof(std::uint64_t)];
    static_assert(sizeof words == sizeof(Descriptor) &&
                  alignof(Descriptor) >= alignof(std::uint64_t));
    const auto* shared = reinterpret_cast<const std::byte*>(&slot);
    for (std::size_t i = 0; i < std::size(words); ++i) {
      __atomic_load(reinterpret_cast<const std::uint64_t*>(shared + i * sizeof words[0]), &words[i],
                    __ATOMIC_RELAXED);
    }
    // cppcheck-suppress uninitvar  // it does not know that __atomic_load writes
    std::memcpy(&out, words, sizeof out);
  }

  const SharedWord<std::uint64_t>* tail_;
  SharedWord<std::uint64_t>* head_;
  const Descriptor* slots_;
  std::uint64_t position_;
};

}  // namespace refit
