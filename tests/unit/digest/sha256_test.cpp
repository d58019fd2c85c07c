// SHA-256 by the CPU's instructions against NIST's examples and against OpenSSL, alone and in
// pairs.
//
// One thread. On a CPU without the instructions the same tests hold for the way through OpenSSL.
#include "digest/sha256.hpp"

#include <gtest/gtest.h>
#include <openssl/sha.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "digest/digest.hpp"

namespace refit {
namespace {

using Bytes = std::vector<std::uint8_t>;
using Span = std::span<const std::byte>;

Span span_of(const Bytes& bytes) { return std::as_bytes(std::span(bytes)); }

Bytes random_bytes(std::mt19937_64& random, std::size_t count) {
  Bytes bytes(count);
  for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(random());
  return bytes;
}

Digest by_openssl(const Bytes& bytes) {
  Digest digest;
  SHA256(bytes.data(), bytes.size(), digest.bytes.data());
  digest.length = 32;
  return digest;
}

std::vector<Sha256By> ways() {
  std::vector<Sha256By> all{Sha256By::openssl};
  if (Sha256::supported()) all.push_back(Sha256By::cpu);
  return all;
}

class EachWay : public testing::TestWithParam<Sha256By> {
 protected:
  static Hasher hasher() { return Hasher(DigestKind::raw, GetParam()); }
  static std::string hex_of(std::string_view text) {
    Hasher sut = hasher();
    sut.update(text);
    return sut.finish().to_hex();
  }
  /// Feeds both to the end, two at a time, in pieces as `random` likes.
  static void feed(std::mt19937_64& random, Hasher& a, Span from_a, Hasher& b, Span from_b) {
    const auto piece = [&random](Span& rest) {
      const std::size_t bytes = random() % 4 == 0 ? rest.size() : random() % 300;
      const Span taken = rest.first(std::min(bytes, rest.size()));
      rest = rest.subspan(taken.size());
      return taken;
    };
    Span of_a, of_b;
    while (!from_a.empty() || !from_b.empty() || !of_a.empty() || !of_b.empty()) {
      if (of_a.empty()) of_a = piece(from_a);
      if (of_b.empty()) of_b = piece(from_b);
      Hasher::update_two(a, of_a, b, of_b);
      ASSERT_TRUE(of_a.empty() || of_b.empty());
    }
  }
};

INSTANTIATE_TEST_SUITE_P(Sha256, EachWay, testing::ValuesIn(ways()), [](const auto& way) {
  return way.param == Sha256By::cpu ? "Cpu" : "Openssl";
});

TEST_P(EachWay, NistExamplesHold) {
  EXPECT_EQ(hex_of("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hex_of(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hex_of("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hex_of("abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnop"
                   "qklmnopqrlmnopqrsmnopqrstnopqrstu"),
            "cf5b16a778af8380036ce59e7b0492370b249b11e8f07a51afac45037afee9d1");
  EXPECT_EQ(hex_of(std::string(1'000'000, 'a')),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST_P(EachWay, EveryShortLengthEqualsOpenssl) {
  std::mt19937_64 random(1);
  const Bytes bytes = random_bytes(random, 300);
  Hasher sut = hasher();
  for (std::size_t length = 0; length <= bytes.size(); ++length) {
    const Bytes message(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(length));
    sut.update(span_of(message));
    EXPECT_EQ(sut.finish(), by_openssl(message)) << length;
  }
}

// Goal: two streams never touch each other, whatever their lengths. Method: every pair of lengths
// around the edges of blocks and of padding.
TEST_P(EachWay, EveryPairOfShortLengthsEqualsOpenssl) {
  std::mt19937_64 random(2);
  const Bytes bytes_a = random_bytes(random, 200);
  const Bytes bytes_b = random_bytes(random, 200);
  std::vector<Digest> expected_a, expected_b;
  for (std::ptrdiff_t length = 0; length <= 200; ++length) {
    expected_a.push_back(by_openssl({bytes_a.begin(), bytes_a.begin() + length}));
    expected_b.push_back(by_openssl({bytes_b.begin(), bytes_b.begin() + length}));
  }
  Hasher a = hasher();
  Hasher b = hasher();
  for (std::size_t of_a = 0; of_a <= 200; ++of_a) {
    for (std::size_t of_b = 0; of_b <= 200; ++of_b) {
      Span from_a = span_of(bytes_a).first(of_a);
      Span from_b = span_of(bytes_b).first(of_b);
      Hasher::update_two(a, from_a, b, from_b);
      ASSERT_TRUE(from_a.empty() || from_b.empty());
      a.update(from_a);
      b.update(from_b);
      ASSERT_EQ(a.finish(), expected_a[of_a]) << of_a << " beside " << of_b;
      ASSERT_EQ(b.finish(), expected_b[of_b]) << of_b << " beside " << of_a;
    }
  }
}

TEST_P(EachWay, RandomPairsInRandomPiecesEqualOpenssl) {
  Hasher a = hasher();
  Hasher b = hasher();
  for (std::uint64_t seed = 0; seed < 500; ++seed) {
    std::mt19937_64 random(seed);
    const Bytes bytes_a = random_bytes(random, random() % 5000);
    const Bytes bytes_b = random_bytes(random, random() % 5000);
    ASSERT_NO_FATAL_FAILURE(feed(random, a, span_of(bytes_a), b, span_of(bytes_b)));
    ASSERT_EQ(a.finish(), by_openssl(bytes_a)) << "seed " << seed;
    ASSERT_EQ(b.finish(), by_openssl(bytes_b)) << "seed " << seed;
  }
}

// Goal: the count of bits is right beyond 32 bits of them, which no short message shows. Method:
// one buffer again and again, 513 MiB of it, by both ways.
TEST(Sha256, MoreThanFourGigabitsEqualOpenssl) {
  std::mt19937_64 random(3);
  const Bytes bytes = random_bytes(random, std::size_t{1} << 20);
  Hasher expected(DigestKind::raw, Sha256By::openssl);
  Hasher sut(DigestKind::raw);
  for (int i = 0; i < 513; ++i) {
    sut.update(span_of(bytes));
    expected.update(span_of(bytes));
  }
  EXPECT_EQ(sut.finish(), expected.finish());
}

TEST(Sha256, OtherHashesArePairedToo) {
  std::mt19937_64 random(4);
  const Bytes bytes_a = random_bytes(random, 1000);
  const Bytes bytes_b = random_bytes(random, 70);
  Hasher a(DigestKind::xxh3);
  Hasher b(DigestKind::raw);
  Span from_a = span_of(bytes_a);
  Span from_b = span_of(bytes_b);
  Hasher::update_two(a, from_a, b, from_b);
  EXPECT_TRUE(from_a.empty() && from_b.empty());
  EXPECT_EQ(b.finish(), by_openssl(bytes_b));
  Hasher alone(DigestKind::xxh3);
  alone.update(span_of(bytes_a));
  EXPECT_EQ(a.finish(), alone.finish());
}

}  // namespace
}  // namespace refit
