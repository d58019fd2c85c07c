// The golden layout of what two processes share. A change here is a change of the protocol: peers
// of another build refuse each other, so the number below changes on purpose or not at all.

#include "ipc/shared_layout.hpp"

#include <gtest/gtest.h>

#include "ipc/state_word.hpp"

namespace refit {
namespace {

TEST(SharedLayout, HashIsTheGoldenOne) { EXPECT_EQ(kLayoutHash, 0xa670ce74141e7355ULL); }

TEST(SharedLayout, OffsetsAreTheGoldenOnes) {
  EXPECT_EQ(sizeof(Descriptor), 56U);
  EXPECT_EQ(offsetof(Descriptor, opcode), 0U);
  EXPECT_EQ(offsetof(Descriptor, payload_bytes), 4U);
  EXPECT_EQ(offsetof(Descriptor, request_id), 8U);
  EXPECT_EQ(offsetof(Descriptor, payload_xxh3), 16U);
  EXPECT_EQ(offsetof(Descriptor, payload_offset), 24U);
  EXPECT_EQ(offsetof(Descriptor, payload), 32U);
  EXPECT_EQ(sizeof(RingSlot), 64U);
  EXPECT_EQ(offsetof(RingSlot, sequence), 0U);
  EXPECT_EQ(offsetof(RingSlot, descriptor), 8U);

  EXPECT_EQ(sizeof(ModuleRecord), 32U);
  EXPECT_EQ(offsetof(ModuleRecord, transaction_high), 0U);
  EXPECT_EQ(offsetof(ModuleRecord, transaction_low), 8U);
  EXPECT_EQ(offsetof(ModuleRecord, version), 16U);
  EXPECT_EQ(offsetof(ModuleRecord, selection), 24U);
  EXPECT_EQ(sizeof(ModuleBlock), 128U);
  EXPECT_EQ(offsetof(ModuleBlock, word), 0U);
  EXPECT_EQ(offsetof(ModuleBlock, name), 8U);
  EXPECT_EQ(offsetof(ModuleBlock, records), 64U);

  EXPECT_EQ(offsetof(RequestRegion, response_head), 0U);
  EXPECT_EQ(offsetof(RequestRegion, client_awake), 64U);
  EXPECT_EQ(offsetof(RequestRegion, gate_answer), 128U);
  EXPECT_EQ(offsetof(RequestRegion, abandoned_request), 192U);
  EXPECT_EQ(offsetof(RequestRegion, requests), 256U);
  EXPECT_EQ(offsetof(RequestRegion, residency), 256U + 64 * 64);
  EXPECT_EQ(offsetof(RequestRegion, arena), 16'384U);

  EXPECT_EQ(offsetof(ResponseRegion, request_head), 0U);
  EXPECT_EQ(offsetof(ResponseRegion, daemon_awake), 64U);
  EXPECT_EQ(offsetof(ResponseRegion, gate), 128U);
  EXPECT_EQ(offsetof(ResponseRegion, modules), 256U);
  EXPECT_EQ(offsetof(ResponseRegion, responses), 256U + 64 * 128);
  EXPECT_EQ(offsetof(ResponseRegion, payload), 16'384U);
}

// Goal: the hash really covers the layout. Method: one value of it changed gives another hash.
TEST(SharedLayout, HashDependsOnEveryValue) {
  EXPECT_NE(detail::mix_all(1, 2, 3), detail::mix_all(1, 2, 4));
  EXPECT_NE(detail::mix_all(1, 2, 3), detail::mix_all(2, 1, 3));
  EXPECT_NE(detail::mix_all(0), detail::mix_all(0, 0));
}

TEST(SharedLayout, EveryModuleOfASessionHasItsOwnCacheLine) {
  EXPECT_EQ(alignof(ModuleBlock) % 64, 0U);
  EXPECT_LE(sizeof(RequestRegion), kRequestRegionBytes);
  EXPECT_LE(sizeof(ResponseRegion), kResponseRegionBytes);
  EXPECT_LE(kPayloadBytesMax, kRequestRegionBytes - offsetof(RequestRegion, arena));
  EXPECT_LE(kPayloadBytesMax, kResponseRegionBytes - offsetof(ResponseRegion, payload));
}

}  // namespace
}  // namespace refit
