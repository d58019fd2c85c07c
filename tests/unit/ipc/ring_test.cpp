// The ring on one mapping: order, full and empty, positions and sequences that no honest peer can
// have.

#include "ipc/ring.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstring>
#include <limits>
#include <thread>

namespace refit {
namespace {

/// What stands in shared memory for one direction.
struct Shared {
  std::atomic<std::uint64_t> head{0};
  std::array<RingSlot, kRingSlots> slots{};
};

Descriptor numbered(std::uint64_t number) {
  Descriptor descriptor;
  descriptor.opcode = static_cast<std::uint16_t>(number * 3);
  descriptor.payload_bytes = static_cast<std::uint32_t>(number * 5);
  descriptor.request_id = number;
  descriptor.payload_offset = number * 7;
  descriptor.payload_xxh3 = ~number;
  const std::uint64_t words[] = {number * 11, number * 13, number * 17};
  static_assert(sizeof words == sizeof descriptor.payload);
  std::memcpy(descriptor.payload, words, sizeof words);
  return descriptor;
}

void expect_numbered(const Descriptor& descriptor, std::uint64_t number) {
  const Descriptor expected = numbered(number);
  ASSERT_EQ(descriptor.opcode, expected.opcode);
  ASSERT_EQ(descriptor.payload_bytes, expected.payload_bytes);
  ASSERT_EQ(descriptor.request_id, expected.request_id);
  ASSERT_EQ(descriptor.payload_offset, expected.payload_offset);
  ASSERT_EQ(descriptor.payload_xxh3, expected.payload_xxh3);
  ASSERT_EQ(std::memcmp(descriptor.payload, expected.payload, sizeof expected.payload), 0);
}

class Ring : public ::testing::Test {
 protected:
  Shared shared_;
  /// Messages that are pushed and consumed.
  void pass(std::uint64_t count) {
    for (std::uint64_t i = 0; i < count; ++i) {
      ASSERT_EQ(producer_.push(numbered(i)), RingProducer::Push::ok);
      ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
      consumer_.advance();
    }
  }
  /// The slot that the consumer reads next.
  std::atomic<std::uint64_t>& awaited() {
    return shared_.slots[shared_.head % kRingSlots].sequence;
  }

  RingProducer producer_{shared_.slots.data(), shared_.head};
  RingConsumer consumer_{shared_.slots.data(), shared_.head};
  Descriptor out_;
};

TEST_F(Ring, IsEmptyAtFirst) {
  EXPECT_TRUE(consumer_.empty());
  EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::empty);
}

TEST_F(Ring, GivesBackInOrderWhatWasPushed) {
  for (std::uint64_t i = 1; i <= 3; ++i) {
    ASSERT_EQ(producer_.push(numbered(i)), RingProducer::Push::ok);
  }
  for (std::uint64_t i = 1; i <= 3; ++i) {
    ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
    expect_numbered(out_, i);
    consumer_.advance();
  }
  EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::empty);
}

TEST_F(Ring, PeekingTwiceGivesTheSameMessage) {
  ASSERT_EQ(producer_.push(numbered(1)), RingProducer::Push::ok);
  ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
  ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
  expect_numbered(out_, 1);
}

TEST_F(Ring, IsFullAtItsSlotsAndTakesOneAgainAfterEachAdvance) {
  for (std::uint64_t i = 0; i < kRingSlots; ++i) {
    ASSERT_EQ(producer_.push(numbered(i)), RingProducer::Push::ok);
  }
  EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::full);
  EXPECT_EQ(producer_.position(), kRingSlots);
  ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
  expect_numbered(out_, 0);
  EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::full) << "peeking frees no slot";
  consumer_.advance();
  EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::ok);
  EXPECT_EQ(producer_.push(numbered(100)), RingProducer::Push::full);
  EXPECT_EQ(producer_.room(), RingProducer::Push::full);
  EXPECT_EQ(producer_.consumed(), 1U);
}

TEST_F(Ring, IsEmptyAgainAfterWholeTurns) {
  for (int turn = 0; turn < 3; ++turn) {
    pass(kRingSlots);
    EXPECT_TRUE(consumer_.empty());
    EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::empty);
  }
}

// Goal: a slot holds what stood there a turn ago or the next message, and nothing else. Method: the
// first turn, where that is 0, and a later one.
TEST_F(Ring, ConsumerBreaksOffAtASequenceThatNoProducerCanHave) {
  for (const std::uint64_t position : {std::uint64_t{0}, std::uint64_t{kRingSlots} + 5}) {
    pass(position - shared_.head);
    const std::uint64_t before = awaited();
    EXPECT_EQ(before, position == 0 ? 0 : position + 1 - kRingSlots);
    for (const std::uint64_t sequence :
         {position == 0 ? std::uint64_t{kRingSlots} : std::uint64_t{0}, position + 2,
          position + 1 + kRingSlots, position, std::numeric_limits<std::uint64_t>::max()}) {
      if (sequence == before) continue;
      awaited().store(sequence);
      EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::peer_broke_protocol) << sequence;
      EXPECT_FALSE(consumer_.empty()) << "whoever looks only for messages must come and see";
    }
    awaited().store(before);
    EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::empty);
  }
}

// Goal: the peer's position is checked whenever it is read, and read before a slot is used again.
TEST_F(Ring, ProducerBreaksOffAtAHeadThatNoConsumerCanHave) {
  pass(kRingSlots + 1);  // it has looked once, and saw a whole turn consumed
  ASSERT_EQ(producer_.consumed(), kRingSlots);
  while (producer_.position() < 2 * kRingSlots)
    ASSERT_EQ(producer_.push(numbered(producer_.position())), RingProducer::Push::ok);
  const std::uint64_t honest = shared_.head;
  const std::uint64_t sequence = shared_.slots[0].sequence;
  for (const std::uint64_t head :
       {std::uint64_t{0}, std::uint64_t{kRingSlots} - 1, std::uint64_t{2} * kRingSlots + 1,
        std::numeric_limits<std::uint64_t>::max()}) {
    shared_.head.store(head);
    EXPECT_FALSE(producer_.look()) << head;
    EXPECT_EQ(producer_.room(), RingProducer::Push::peer_broke_protocol) << head;
    EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::peer_broke_protocol) << head;
    EXPECT_EQ(producer_.consumed(), kRingSlots) << "what it said is not used";
  }
  EXPECT_EQ(shared_.slots[0].sequence, sequence)
      << "nothing is published to a peer that broke the protocol";
  shared_.head.store(honest);
  EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::ok);
}

// Goal: nothing is lost, doubled, torn or reordered between two threads. Method: every field and a
// plain payload beside the slot are made from a running number; TSan sees the payload as it sees
// the slots, so that a missing ordering is a race here.
TEST_F(Ring, CarriesEverythingInOrderBetweenTwoThreads) {
  constexpr std::uint64_t kMessages = 200'000;
  std::array<std::uint64_t, kRingSlots> payload{};
  std::thread producing([&] {
    for (std::uint64_t i = 1; i <= kMessages;) {
      const RingProducer::Push possible = producer_.room();
      if (possible == RingProducer::Push::peer_broke_protocol) return;
      if (possible == RingProducer::Push::full) {
        std::this_thread::yield();
        continue;
      }
      payload[producer_.position() % kRingSlots] = i * 11;
      if (producer_.push(numbered(i)) == RingProducer::Push::ok) ++i;
    }
  });
  std::uint64_t position = 0;
  for (std::uint64_t i = 1; i <= kMessages;) {
    const RingConsumer::Peek peek = consumer_.peek(out_);
    if (peek == RingConsumer::Peek::empty) {
      std::this_thread::yield();
      continue;
    }
    EXPECT_EQ(peek, RingConsumer::Peek::message);
    expect_numbered(out_, i);
    EXPECT_EQ(payload[position % kRingSlots], i * 11);
    if (HasFailure()) break;
    consumer_.advance();
    ++position;
    ++i;
  }
  if (HasFailure()) {
    shared_.head.store(std::numeric_limits<std::uint64_t>::max());  // lets the producer end
  }
  producing.join();
  EXPECT_TRUE(consumer_.empty());
}

}  // namespace
}  // namespace refit
