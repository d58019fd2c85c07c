// The ring: single producer, single consumer, one cache line for each message, 64-bit absolute
// positions.
//
// One instance of each class per direction and process; each belongs to one thread. A ring begins
// empty, with its session. One store of the slot's sequence publishes the message beside it, so
// that position, descriptor and a short payload come to the consumer in one cache line. Positions
// never wrap in practice, so there is no ABA. What the peer writes is read once per call and
// checked: a value that the protocol cannot produce is reported and never used.
#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>

#include "ipc/shared_layout.hpp"

namespace refit {

class RingProducer {
 public:
  /// @param slots  in the region that this side writes.
  /// @param head   the peer's position, in the region that the peer writes.
  RingProducer(RingSlot* slots, const SharedWord<std::uint64_t>& head) noexcept
      : slots_(slots), head_(&head) {}

  enum class Push { ok, full, peer_broke_protocol };

  Push push(const Descriptor& descriptor) noexcept {
    if (const Push possible = room(); possible != Push::ok) return possible;
    RingSlot& slot = slots_[position_ % kRingSlots];
    slot.descriptor = descriptor;
    slot.sequence.store(++position_);  // publishes; pairs with the load in RingConsumer::peek
    return Push::ok;
  }

  /// What a push would find.
  [[nodiscard]] Push room() noexcept {
    if (position_ - consumed_ < kRingSlots) return Push::ok;
    if (!look()) return Push::peer_broke_protocol;
    return position_ - consumed_ < kRingSlots ? Push::ok : Push::full;
  }

  /// Reads how far the peer has consumed; false if it cannot be there. To be asked only where that
  /// matters: the peer writes the word for each message, so that reading it each time would cost
  /// one more turn of a cache line.
  [[nodiscard]] bool look() noexcept {
    const std::uint64_t head = head_->load();  // pairs with the store in RingConsumer::advance
    if (head < consumed_ || head > position_) return false;
    consumed_ = head;
    return true;
  }

  /// Position that the next push gets.
  [[nodiscard]] std::uint64_t position() const noexcept { return position_; }
  /// How far the peer had consumed at the last look.
  [[nodiscard]] std::uint64_t consumed() const noexcept { return consumed_; }

 private:
  RingSlot* slots_;
  const SharedWord<std::uint64_t>* head_;
  std::uint64_t position_ = 0;
  std::uint64_t consumed_ = 0;
};

class RingConsumer {
 public:
  /// @param slots  in the region that the peer writes.
  /// @param head   this side's position, in the region that this side writes.
  RingConsumer(const RingSlot* slots, SharedWord<std::uint64_t>& head) noexcept
      : slots_(slots), head_(&head) {}

  enum class Peek { empty, message, peer_broke_protocol };

  /// Copies the next descriptor out. The slot stays the consumer's until advance().
  Peek peek(Descriptor& out) const noexcept {
    const std::uint64_t sequence = slot().sequence.load();  // pairs with RingProducer::push
    if (sequence == position_ + 1) {
      read_once(slot().descriptor, out);
      return Peek::message;
    }
    return sequence == sequence_before() ? Peek::empty : Peek::peer_broke_protocol;
  }

  [[nodiscard]] bool empty() const noexcept { return slot().sequence.load() == sequence_before(); }

  /// Gives the slot and its payload back to the producer.
  void advance() noexcept {
    head_->store(++position_);  // pairs with the load in RingProducer::look
  }

 private:
  [[nodiscard]] const RingSlot& slot() const noexcept { return slots_[position_ % kRingSlots]; }
  /// What stands in the slot until the next message does: the one of a turn ago.
  [[nodiscard]] std::uint64_t sequence_before() const noexcept {
    return position_ < kRingSlots ? 0 : position_ + 1 - kRingSlots;
  }

  /// Every word of the descriptor is read exactly once, whatever the peer does to it meanwhile.
  static void read_once(const Descriptor& descriptor, Descriptor& out) noexcept {
    std::uint64_t words[sizeof(Descriptor) / sizeof(std::uint64_t)];
    static_assert(sizeof words == sizeof(Descriptor) &&
                  alignof(Descriptor) >= alignof(std::uint64_t));
    const auto* shared = reinterpret_cast<const std::byte*>(&descriptor);
    for (std::size_t i = 0; i < std::size(words); ++i) {
      __atomic_load(reinterpret_cast<const std::uint64_t*>(shared + i * sizeof words[0]), &words[i],
                    __ATOMIC_RELAXED);
    }
    // It does not know that __atomic_load writes, and takes bytes for something with a constructor.
    // cppcheck-suppress [uninitvar, memsetClass]
    std::memcpy(&out, words, sizeof out);
  }

  const RingSlot* slots_;
  SharedWord<std::uint64_t>* head_;
  std::uint64_t position_ = 0;
};

}  // namespace refit
