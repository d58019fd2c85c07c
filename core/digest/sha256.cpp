// The block function of FIPS 180-4 over any number of lanes, and the streams around it.
//
// Target attributes instead of compiler flags, so that one binary runs on any x86-64. While tensor
// bytes are read no live frame here owns anything.
#include "digest/sha256.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

namespace refit {
namespace {

static_assert(std::is_trivially_destructible_v<Sha256>);

using Blocks = const std::byte*;

template <std::size_t kLanes>
using PerLane = std::make_index_sequence<kLanes>;

#if defined(__x86_64__)

// FIPS 180-4, 4.2.2.
alignas(16) constexpr std::array<std::uint32_t, 64> kRoundConstants{
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define REFIT_SHA_INLINE [[gnu::always_inline, gnu::target("sha,sse4.1")]] inline

struct Lane {
  __m128i feba;
  __m128i hgdc;
  __m128i words[4];  // the last sixteen of the message schedule, four each
};

REFIT_SHA_INLINE __m128i load(const void* from) {
  return _mm_loadu_si128(static_cast<const __m128i*>(from));
}

// Rounds 4 * kQuad to 4 * kQuad + 3 of one lane.
template <std::size_t kQuad>
REFIT_SHA_INLINE void four_rounds(Lane& lane, Blocks block) {
  __m128i& words = lane.words[kQuad % 4];
  if constexpr (kQuad < 4) {
    const __m128i big_endian = _mm_set_epi8(12, 13, 14, 15, 8, 9, 10, 11, 4, 5, 6, 7, 0, 1, 2, 3);
    words = _mm_shuffle_epi8(load(block + 16 * kQuad), big_endian);
  } else {
    const __m128i before_1 = lane.words[(kQuad + 3) % 4];
    const __m128i before_2 = lane.words[(kQuad + 2) % 4];
    const __m128i before_3 = lane.words[(kQuad + 1) % 4];
    const __m128i seven_back = _mm_alignr_epi8(before_1, before_2, 4);
    words = _mm_add_epi32(_mm_sha256msg1_epu32(words, before_3), seven_back);
    words = _mm_sha256msg2_epu32(words, before_1);
  }
  const __m128i sum = _mm_add_epi32(words, load(&kRoundConstants[4 * kQuad]));
  lane.hgdc = _mm_sha256rnds2_epu32(lane.hgdc, lane.feba, sum);
  lane.feba = _mm_sha256rnds2_epu32(lane.feba, lane.hgdc, _mm_shuffle_epi32(sum, 0x0e));
}

template <std::size_t kQuad, std::size_t... kLane>
REFIT_SHA_INLINE void four_rounds_of_each(Lane* lanes, const Blocks* blocks,
                                          std::index_sequence<kLane...>) {
  (four_rounds<kQuad>(lanes[kLane], blocks[kLane]), ...);
}

template <std::size_t kLanes, std::size_t... kQuad>
REFIT_SHA_INLINE void all_rounds(Lane* lanes, const Blocks* blocks, std::index_sequence<kQuad...>) {
  (four_rounds_of_each<kQuad>(lanes, blocks, PerLane<kLanes>{}), ...);
}

// Feeds `count` blocks to each of the states.
template <std::size_t kLanes>
[[gnu::target("sha,sse4.1")]] void compress(std::array<Sha256::State*, kLanes> states,
                                            std::array<Blocks, kLanes> blocks,
                                            std::size_t count) noexcept {
  Lane lanes[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) {
    lanes[i].feba = load(states[i]->feba.data());
    lanes[i].hgdc = load(states[i]->hgdc.data());
  }
  for (; count > 0; --count) {
    __m128i before[kLanes][2];
    for (std::size_t i = 0; i < kLanes; ++i) {
      before[i][0] = lanes[i].feba;
      before[i][1] = lanes[i].hgdc;
    }
    all_rounds<kLanes>(lanes, blocks.data(), std::make_index_sequence<16>{});
    for (std::size_t i = 0; i < kLanes; ++i) {
      lanes[i].feba = _mm_add_epi32(lanes[i].feba, before[i][0]);
      lanes[i].hgdc = _mm_add_epi32(lanes[i].hgdc, before[i][1]);
      blocks[i] += Sha256::kBlockBytes;
    }
  }
  for (std::size_t i = 0; i < kLanes; ++i) {
    _mm_store_si128(reinterpret_cast<__m128i*>(states[i]->feba.data()), lanes[i].feba);
    _mm_store_si128(reinterpret_cast<__m128i*>(states[i]->hgdc.data()), lanes[i].hgdc);
  }
}

bool has_instructions() noexcept {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kSsse3 = 1U << 9;
  constexpr unsigned kSse41 = 1U << 19;
  constexpr unsigned kSha = 1U << 29;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kSsse3) == 0 || (c & kSse41) == 0) return false;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (b & kSha) != 0;
}

#else

template <std::size_t kLanes>
void compress(std::array<Sha256::State*, kLanes>, std::array<Blocks, kLanes>,
              std::size_t) noexcept {}

bool has_instructions() noexcept { return false; }

#endif

// FIPS 180-4, 5.3.3.
constexpr Sha256::State kInitialState{{0x9b05688c, 0x510e527f, 0xbb67ae85, 0x6a09e667},
                                      {0x5be0cd19, 0x1f83d9ab, 0xa54ff53a, 0x3c6ef372}};

template <typename Integer>
void store_big_endian(void* to, Integer value) noexcept {
  static_assert(std::endian::native == std::endian::little);
  if constexpr (sizeof value == 8) {
    value = __builtin_bswap64(value);
  } else {
    value = __builtin_bswap32(value);
  }
  std::memcpy(to, &value, sizeof value);
}

}  // namespace

bool Sha256::supported() noexcept {
  static const bool answer = has_instructions();
  return answer;
}

void Sha256::reset() noexcept {
  state_ = kInitialState;
  bytes_ = 0;
}

// Completes a block that was begun, as far as `from` goes.
void Sha256::fill_block(std::span<const std::byte>& from) noexcept {
  const std::size_t used = bytes_ % kBlockBytes;
  if (used == 0 || from.empty()) return;
  const std::size_t taken = std::min(kBlockBytes - used, from.size());
  std::memcpy(block_.data() + used, from.data(), taken);
  bytes_ += taken;
  from = from.subspan(taken);
  if (used + taken == kBlockBytes) compress<1>({&state_}, {block_.data()}, 1);
}

// Keeps what is less than a block; none is begun.
void Sha256::keep(std::span<const std::byte>& rest) noexcept {
  if (rest.empty()) return;
  std::memcpy(block_.data(), rest.data(), rest.size());
  bytes_ += rest.size();
  rest = {};
}

void Sha256::update(std::span<const std::byte> bytes) noexcept {
  fill_block(bytes);
  const std::size_t whole = bytes.size() / kBlockBytes * kBlockBytes;
  compress<1>({&state_}, {bytes.data()}, whole / kBlockBytes);
  bytes_ += whole;
  bytes = bytes.subspan(whole);
  keep(bytes);
}

void Sha256::update_two(Sha256& a, std::span<const std::byte>& from_a, Sha256& b,
                        std::span<const std::byte>& from_b) noexcept {
  if (from_a.empty() || from_b.empty()) {
    a.update(std::exchange(from_a, {}));
    b.update(std::exchange(from_b, {}));
    return;
  }
  a.fill_block(from_a);
  b.fill_block(from_b);
  const std::size_t whole = std::min(from_a.size(), from_b.size()) / kBlockBytes * kBlockBytes;
  compress<2>({&a.state_, &b.state_}, {from_a.data(), from_b.data()}, whole / kBlockBytes);
  a.bytes_ += whole;
  b.bytes_ += whole;
  from_a = from_a.subspan(whole);
  from_b = from_b.subspan(whole);
  if (from_a.size() < kBlockBytes) a.keep(from_a);
  if (from_b.size() < kBlockBytes) b.keep(from_b);
}

Sha256::Value Sha256::finish() noexcept {
  // A one bit, zeros up to the last eight bytes of a block, and the count of bits.
  const std::uint64_t bits = bytes_ * 8;
  const std::size_t used = bytes_ % kBlockBytes;
  std::array<std::byte, 2 * kBlockBytes> last{};
  std::copy_n(block_.begin(), used, last.begin());
  last[used] = std::byte{0x80};
  const std::size_t blocks = used + 1 + sizeof bits <= kBlockBytes ? 1 : 2;
  store_big_endian(last.data() + blocks * kBlockBytes - sizeof bits, bits);
  compress<1>({&state_}, {last.data()}, blocks);

  const auto& [f, e, b, a] = state_.feba;
  const auto& [h, g, d, c] = state_.hgdc;
  Value value;
  std::size_t at = 0;
  for (const std::uint32_t word : {a, b, c, d, e, f, g, h}) {
    store_big_endian(value.data() + at, word);
    at += sizeof word;
  }
  reset();
  return value;
}

}  // namespace refit
