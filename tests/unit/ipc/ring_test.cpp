// The ring on one mapping: order, full and empty, positions that no honest peer can have.

#include "ipc/ring.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>
#include <thread>

namespace refit {
namespace {

/// What stands in shared memory for one direction.
struct Shared {
  std::atomic<std::uint64_t> tail{0};
  std::atomic<std::uint64_t> head{0};
  std::array<Descriptor, kRingSlots> slots{};
};

Descriptor numbered(std::uint64_t number) {
  Descriptor descriptor;
  descriptor.opcode = static_cast<std::uint16_t>(number * 3);
  descriptor.payload_bytes = static_cast<std::uint32_t>(number * 5);
  descriptor.request_id = number;
  descriptor.payload_offset = number * 7;
  descriptor.payload_xxh3 = ~number;
  return descriptor;
}

void expect_numbered(const Descriptor& descriptor, std::uint64_t number) {
  const Descriptor expected = numbered(number);
  ASSERT_EQ(descriptor.opcode, expected.opcode);
  ASSERT_EQ(descriptor.payload_bytes, expected.payload_bytes);
  ASSERT_EQ(descriptor.request_id, expected.request_id);
  ASSERT_EQ(descriptor.payload_offset, expected.payload_offset);
  ASSERT_EQ(descriptor.payload_xxh3, expected.payload_xxh3);
}

class Ring : public ::testing::Test {
 protected:
  Shared shared_;
  RingProducer producer_{shared_.tail, shared_.head, shared_.slots.data()};
  RingConsumer consumer_{shared_.tail, shared_.head, shared_.slots.data()};
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
  EXPECT_EQ(producer_.consumed(), 1U);
}

TEST_F(Ring, ConsumerBreaksOffAtATailThatNoProducerCanHave) {
  ASSERT_EQ(producer_.push(numbered(1)), RingProducer::Push::ok);
  ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
  consumer_.advance();
  for (const std::uint64_t tail : {std::uint64_t{0}, std::uint64_t{kRingSlots} + 2,
                                   std::numeric_limits<std::uint64_t>::max()}) {
    shared_.tail.store(tail);
    EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::peer_broke_protocol) << tail;
  }
  shared_.tail.store(std::uint64_t{kRingSlots} + 1);
  EXPECT_EQ(consumer_.peek(out_), RingConsumer::Peek::message) << "a full ring is honest";
}

TEST_F(Ring, ProducerBreaksOffAtAHeadBeyondWhatItProduced) {
  ASSERT_EQ(producer_.push(numbered(1)), RingProducer::Push::ok);
  for (const std::uint64_t head : {std::uint64_t{2}, std::numeric_limits<std::uint64_t>::max()}) {
    shared_.head.store(head);
    EXPECT_EQ(producer_.push(numbered(2)), RingProducer::Push::peer_broke_protocol) << head;
    EXPECT_EQ(producer_.consumed(), 1U) << "clamped to what was produced";
  }
  EXPECT_EQ(shared_.tail.load(), 1U) << "nothing is published to a peer that broke the protocol";
}

TEST_F(Ring, HeadThatGoesBackOnlyMakesTheRingLookFull) {
  for (std::uint64_t i = 0; i < kRingSlots; ++i) {
    ASSERT_EQ(producer_.push(numbered(i)), RingProducer::Push::ok);
    ASSERT_EQ(consumer_.peek(out_), RingConsumer::Peek::message);
    consumer_.advance();
  }
  shared_.head.store(0);
  EXPECT_EQ(producer_.push(numbered(99)), RingProducer::Push::full);
}

// Goal: nothing is lost, doubled, torn or reordered between two threads. Method: every field and a
// plain payload beside the slot are made from a running number; TSan sees the payload as it sees
// the slots, so that a missing ordering is a race here.
TEST_F(Ring, CarriesEverythingInOrderBetweenTwoThreads) {
  constexpr std::uint64_t kMessages = 200'000;
  std::array<std::uint64_t, kRingSlots> payload{};
  std::thread producing([&] {
    for (std::uint64_t i = 1; i <= kMessages;) {
      if (producer_.position() - producer_.consumed() >= kRingSlots) {
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
    shared_.head.store(kMessages);  // lets the producer end
  }
  producing.join();
  EXPECT_TRUE(consumer_.empty());
}

}  // namespace
}  // namespace refit
