// Hashes against fixed values: the golden vectors of SGLang's checker, values of Python's hashlib
// and of the xxhsum tool, and OpenSSL's one-shot function.
//
// One thread. Knows the core's digest interface only.
#include "digest/digest.hpp"

#include <gtest/gtest.h>
#include <openssl/sha.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "memory/sigbus_guard.hpp"

namespace refit {
namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes bytes_of_hex(std::string_view hex) {
  Bytes bytes;
  for (std::size_t i = 0; i + 1 < hex.size(); i += 2) {
    bytes.push_back(
        static_cast<std::uint8_t>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16)));
  }
  return bytes;
}

// The sequence behind the xxhsum and hashlib values below.
Bytes pattern_bytes(std::size_t count) {
  Bytes bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::uint8_t>(i % 251);
  return bytes;
}

TensorSpec spec_of(std::string name, DType dtype, Dims shape, Dims strides = {}) {
  TensorSpec spec;
  spec.name = std::move(name);
  spec.dtype = dtype;
  spec.shape = std::move(shape);
  spec.strides = std::move(strides);
  return spec;
}

TensorView view_of(const TensorSpec& spec, const Bytes& bytes) {
  return {&spec, reinterpret_cast<const std::byte*>(bytes.data())};
}

std::string tensor_hex(DigestKind kind, const TensorSpec& spec, const Bytes& bytes) {
  Hasher sut(kind);
  return digest_tensor(sut, kind, view_of(spec, bytes)).to_hex();
}

std::string one_shot_sha256(const Bytes& bytes) {
  Digest digest;
  SHA256(bytes.data(), bytes.size(), digest.bytes.data());
  digest.length = 32;
  return digest.to_hex();
}

struct Golden {
  DType dtype;
  Dims shape;
  const char* bytes;
  const char* sglang;
};

constexpr const char* kBf16Bytes = "0000803f004040408040a040";
constexpr const char* kF32Bytes = "000000000000803f0000004000004040000080400000a040";

// (2, 3), (6,), scalars and empties; the first of each of bf16, f32, i64 come from SGLang's rules
// as written down with the project's references, the rest from hashlib.
const Golden kGoldens[] = {
    {DType::bfloat16,
     {2, 3},
     kBf16Bytes,
     "8ba196e3a883df1c7546f265a6d6172d2254c7e21f353bf635d78ad7d7a45450"},
    {DType::bfloat16,
     {6},
     kBf16Bytes,
     "613d4f8d90555cc3f5cf565eba20d7d8838aa1986763ef06674e048beb2ed37c"},
    {DType::float32,
     {2, 3},
     kF32Bytes,
     "e20933188a476ce2418266391f2f875503b2dbea37a1f5a230c18b535bc495b5"},
    {DType::float32,
     {},
     "0000e040",
     "8bc059d0e2eca020bd2cf282ed95203c45abb0b83d6e7897ee20ef990d00f63e"},
    {DType::int64,
     {},
     "0700000000000000",
     "c47b9eb9dadfe352a6a5d2b74233ce6e820045bf40faae836476ccc0b75f4aa7"},
    {DType::bfloat16, {0}, "", "e1e1cba52298223a552e2fbfc11e9a9d30dbeb8ae05aa6aa0bc1e420eeaf1114"},
    {DType::float16,
     {2, 3},
     "0000003c0040004200440045",
     "d8d96313248c7c0f24a7458c5972797c6c25476c4a58f0736d2b29307fe9e4f1"},
    {DType::float64,
     {2, 3},
     "0000000000000000000000000000f03f0000000000000040000000000000084000000000000010400000000000001"
     "440",
     "d962763c32cc442324968da53d74f5e64ac99748dd3cb3cd52066a06ddc8563f"},
    {DType::int64,
     {2, 3},
     "000000000000000001000000000000000200000000000000030000000000000004000000000000000500000000000"
     "000",
     "2821a902fcfe5cd0b6b8a771ee2a5d44ad88cab557ab4ac9b45d64a45c56e00e"},
    {DType::int32,
     {2, 3},
     "000000000100000002000000030000000400000005000000",
     "b4104eb5b37c6b7233d15a269f2376e33ad21505f8505b6f3d73cc15942511ff"},
    {DType::int16,
     {2, 3},
     "000001000200030004000500",
     "1c028f449e176d06407dc64ab9016c66c6dce22d090554ec21b0e2277bcb2887"},
    {DType::int8,
     {2, 3},
     "fdfeff000102",
     "40f5e6d1b1aed5a07e4cecf3affb76978a252ceed36b79fe6e963c8195fba8fd"},
    {DType::uint8,
     {2, 3},
     "fafbfcfdfeff",
     "00a26cf2d7cf4572cc6b9279cae82189a730c517647328ce0d4b70d70d439da2"},
    {DType::boolean,
     {2, 3},
     "000101000100",
     "0cb73a9299cb3a6db4381c50cf110c05d08327b1abff112921f1850c02815394"},
    {DType::boolean, {}, "01", "547e91d02e71f435103701ed4a364965cd424949a7e758eff52671135a130dd9"},
    {DType::float8_e4m3fn,
     {2, 3},
     "00384044484a",
     "6223a78da988216e6d6b8d137e82b48d1ffdaf09d88f77f2d8c7631d9ae76979"},
    {DType::float8_e5m2,
     {2, 3},
     "003c40424445",
     "cabc9b06d8724f89b104374ab0b008753f6b98f591685dcaa018dfe261387789"},
    {DType::float32,
     {3, 0, 2},
     "",
     "9e43e2cd6a119b3a0665289e9946ffee0f26369ff1e128cf35575d0047c72221"},
};

TEST(Digest, SglangKindEqualsGoldenVectors) {
  for (const Golden& golden : kGoldens) {
    const TensorSpec spec = spec_of("any name, it is not hashed", golden.dtype, golden.shape);
    const Bytes bytes = bytes_of_hex(golden.bytes);
    EXPECT_EQ(tensor_hex(DigestKind::sglang, spec, bytes), golden.sglang)
        << dtype_name(golden.dtype) << ' ' << shape_repr(golden.shape);
  }
}

TEST(Digest, RawKindEqualsOpenSslOneShotForEveryGoldenVector) {
  for (const Golden& golden : kGoldens) {
    const TensorSpec spec = spec_of("t", golden.dtype, golden.shape);
    const Bytes bytes = bytes_of_hex(golden.bytes);
    EXPECT_EQ(tensor_hex(DigestKind::raw, spec, bytes), one_shot_sha256(bytes))
        << dtype_name(golden.dtype) << ' ' << shape_repr(golden.shape);
  }
}

TEST(Digest, FiveDimensionsAreWrittenInTheShapePrefix) {
  Bytes bytes(96);
  for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<std::uint8_t>(i);
  EXPECT_EQ(tensor_hex(DigestKind::sglang, spec_of("t", DType::float16, {2, 3, 1, 2, 4}), bytes),
            "490957a1dc6493e93bb9b194c166cc89ba74f9426cdd799f85b32e1b85152c9c");
}

TEST(Digest, Xxh3KindEqualsXxhsum) {
  const std::pair<Bytes, const char*> known[] = {
      {{}, "99aa06d3014798d86001c324468d497f"},
      {{'a', 'b', 'c'}, "06b05ab6733a618578af5f94892f3950"},
      {bytes_of_hex(kBf16Bytes), "8c4c11d6bdc16ba27affefdb2c7f0cf4"},
      {pattern_bytes(1000), "18bf41bc8229e27733ef703fb2b20ed1"},
      {pattern_bytes(100000), "54182c58bbb1337c42c23aeead96750d"},
  };
  for (const auto& [bytes, hex] : known) {
    EXPECT_EQ(tensor_hex(DigestKind::xxh3, spec_of("t", DType::uint8, {bytes.size()}), bytes), hex)
        << bytes.size() << " bytes";
  }
}

TEST(Digest, PayloadHashEqualsXxhsum) {
  EXPECT_EQ(payload_hash(nullptr, 0), 0x2d06800538d394c2U);
  EXPECT_EQ(payload_hash("abc", 3), 0x78af5f94892f3950U);
  const Bytes bytes = pattern_bytes(100000);
  EXPECT_EQ(payload_hash(bytes.data(), bytes.size()), 0x42c23aeead96750dU);
}

TEST(Digest, ModuleOfTwoTensorsEqualsGoldenVector) {
  const TensorSpec a = spec_of("a", DType::bfloat16, {2, 3});
  const TensorSpec b = spec_of("b", DType::float32, {2, 3});
  const Bytes a_bytes = bytes_of_hex(kBf16Bytes);
  const Bytes b_bytes = bytes_of_hex(kF32Bytes);
  Hasher sut(DigestKind::raw);
  EXPECT_EQ(digest_module(sut, {view_of(b, b_bytes), view_of(a, a_bytes)}).to_hex(),
            "e3b8fa9a41be8295bfabe11d5d6004282552d12acb1cc87324ef1723f799ecc3");
  Hasher xxh3(DigestKind::xxh3);
  EXPECT_EQ(digest_module(xxh3, {view_of(b, b_bytes), view_of(a, a_bytes)}).to_hex(),
            "9e647dab217f424dcad31a817da0bb65");
}

TEST(Digest, ModuleOfEveryDTypeEqualsHashlib) {
  // Method: one tensor of each dtype, named as torch names the dtype; hashlib hashed the same in
  // sorted order.
  std::vector<TensorSpec> specs;
  std::vector<Bytes> contents;
  for (const Golden& golden : kGoldens) {
    if (golden.shape != Dims{2, 3}) continue;
    specs.push_back(spec_of(std::string(dtype_name(golden.dtype)), golden.dtype, golden.shape));
    contents.push_back(bytes_of_hex(golden.bytes));
  }
  ASSERT_EQ(specs.size(), 12U);
  std::vector<TensorView> views;
  for (std::size_t i = 0; i < specs.size(); ++i) views.push_back(view_of(specs[i], contents[i]));
  Hasher sut(DigestKind::sglang);
  EXPECT_EQ(digest_module(sut, views).to_hex(),
            "9b297ec365bd4357076262503b26f38f009a3268f259023d1a1bba5b5086933b");
}

TEST(Digest, ModuleOrderIsBytewise) {
  // Goal: "blocks.10" before "blocks.2", capitals before small letters, UTF-8 after ASCII, the
  // empty name first.
  const char* names[] = {"blocks.2.w", "blocks.10.w", "Zeta", "\u00e9clair", "alpha", ""};
  std::vector<TensorSpec> specs;
  std::vector<Bytes> contents;
  for (std::uint8_t i = 0; i < 6; ++i) {
    specs.push_back(spec_of(names[i], DType::int64, {}));
    contents.push_back({i, 0, 0, 0, 0, 0, 0, 0});
  }
  std::vector<TensorView> views;
  for (std::size_t i = 0; i < specs.size(); ++i) views.push_back(view_of(specs[i], contents[i]));
  constexpr const char* kExpected =
      "670a93008e45adfeeab22df5deecdc7bbc6094ff673f6badc27b05f8c1c3901b";
  Hasher sut(DigestKind::raw);
  EXPECT_EQ(digest_module(sut, views).to_hex(), kExpected);
}

TEST(Digest, EmptyModuleIsTheHashOfNothing) {
  Hasher sut(DigestKind::raw);
  EXPECT_EQ(digest_module(sut, {}).to_hex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(Digest, PiecesOfAnySizeEqualOneShot) {
  const Bytes bytes = pattern_bytes(100000);
  for (const std::size_t piece : {1U, 7U, 63U, 64U, 65U, 4096U, 99999U, 100000U}) {
    Hasher sut(DigestKind::raw);
    for (std::size_t at = 0; at < bytes.size(); at += piece) {
      sut.update(std::as_bytes(std::span(bytes).subspan(at, std::min(piece, bytes.size() - at))));
    }
    EXPECT_EQ(sut.finish().to_hex(), one_shot_sha256(bytes)) << piece;
  }
}

TEST(Digest, FinishAndResetMakeTheHasherNew) {
  const Bytes bytes = pattern_bytes(1000);
  for (const DigestKind kind : {DigestKind::raw, DigestKind::xxh3}) {
    Hasher sut(kind);
    sut.update(std::as_bytes(std::span(bytes)));
    const Digest first = sut.finish();
    EXPECT_EQ(first.length, kind == DigestKind::raw ? 32 : 16);
    sut.update("what a fault interrupted");
    sut.reset();
    sut.update(std::as_bytes(std::span(bytes)));
    EXPECT_EQ(sut.finish(), first);
    Hasher moved(std::move(sut));
    moved.update(std::as_bytes(std::span(bytes)));
    EXPECT_EQ(moved.finish(), first);
  }
}

// A strided tensor, and its elements gathered one by one in row-major order by the definition of a
// stride.
struct Strided {
  Dims shape;
  Dims strides;
};

Bytes gather(const Bytes& storage, const Strided& layout, std::size_t element) {
  Bytes gathered;
  std::uint64_t count = 1;
  for (const std::uint64_t extent : layout.shape) count *= extent;
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t rest = i;
    std::uint64_t at = 0;
    for (std::size_t d = layout.shape.size(); d-- > 0;) {
      at += rest % layout.shape[d] * layout.strides[d];
      rest /= layout.shape[d];
    }
    const auto from = storage.begin() + static_cast<std::ptrdiff_t>(at * element);
    gathered.insert(gathered.end(), from, from + static_cast<std::ptrdiff_t>(element));
  }
  return gathered;
}

TEST(Digest, StridedTensorEqualsItsContiguousCopy) {
  // Goal: every way in which dimensions merge or do not. Method: gather by definition, hash both,
  // for each element size.
  const Strided layouts[] = {
      {{64, 48}, {1, 64}},                 // transposed
      {{16, 100}, {128, 1}},               // padded rows
      {{16, 100}, {100, 1}},               // contiguous, said explicitly
      {{3, 4, 5, 6}, {240, 60, 12, 2}},    // every second element
      {{3, 4, 5, 6}, {6, 18, 72, 1}},      // permuted outer dimensions
      {{5, 1, 7}, {7, 999999, 1}},         // stride of a single element is never used
      {{1, 1, 1}, {12345, 54321, 77777}},  // one element
      {{4, 8}, {0, 1}},                    // broadcast rows
      {{10}, {0}},                         // broadcast element
      {{2, 3, 3000}, {12000, 4000, 1}},    // runs longer than the gather buffer's
      {{4, 700}, {900, 1}},                // runs around its limit
      {{9000}, {2}},                       // more single elements than it holds
      {{3, 0, 5}, {5, 5, 1}},              // empty
      {{}, {}},                            // scalar
  };
  const Bytes storage = pattern_bytes(8 * 32768);
  const std::pair<DType, std::size_t> dtypes[] = {
      {DType::uint8, 1}, {DType::bfloat16, 2}, {DType::float32, 4}, {DType::int64, 8}};
  for (const auto& [dtype, element] : dtypes) {
    for (const Strided& layout : layouts) {
      const Bytes dense = gather(storage, layout, element);
      for (const DigestKind kind : {DigestKind::sglang, DigestKind::raw, DigestKind::xxh3}) {
        EXPECT_EQ(tensor_hex(kind, spec_of("t", dtype, layout.shape, layout.strides), storage),
                  tensor_hex(kind, spec_of("t", dtype, layout.shape), dense))
            << dtype_name(dtype) << ' ' << shape_repr(layout.shape) << " strides "
            << shape_repr(layout.strides) << ' ' << digest_kind_name(kind);
      }
      EXPECT_EQ(
          tensor_hex(DigestKind::raw, spec_of("t", dtype, layout.shape, layout.strides), storage),
          one_shot_sha256(dense));
    }
  }
}

TEST(Digest, FaultInTheTensorIsAnErrorAndTheHasherGoesOn) {
  // Goal: a client that truncates its memory under the hash costs one error. Method: a memfd cut to
  // one page, hashed over two pages in the guard; afterwards the same hasher gives the right digest
  // of what is left.
  ASSERT_TRUE(install_sigbus_handler());
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  const int fd = memfd_create("digest-test", MFD_CLOEXEC);
  ASSERT_GE(fd, 0);
  ASSERT_EQ(ftruncate(fd, static_cast<off_t>(2 * page)), 0);
  void* const base = mmap(nullptr, 2 * page, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  ASSERT_NE(base, MAP_FAILED);
  std::memset(base, 7, 2 * page);
  ASSERT_EQ(ftruncate(fd, static_cast<off_t>(page)), 0);
  for (const DigestKind kind : {DigestKind::raw, DigestKind::xxh3}) {
    Hasher sut(kind);
    const TensorSpec cut = spec_of("t", DType::uint8, {2 * page});
    const TensorSpec rest = spec_of("t", DType::uint8, {page});
    const auto* data = static_cast<const std::byte*>(base);
    EXPECT_FALSE(run_guarded(base, 2 * page, [&] { update_with_elements(sut, {&cut, data}); }));
    sut.reset();
    Digest digest;
    EXPECT_TRUE(run_guarded(base, 2 * page, [&] {
      update_with_elements(sut, {&rest, data});
      digest = sut.finish();
    }));
    EXPECT_EQ(digest.to_hex(), tensor_hex(kind, rest, Bytes(page, 7)));

    // The same beside a stream that is all there.
    const Bytes whole = pattern_bytes(3 * page);
    Hasher beside(kind);
    EXPECT_FALSE(run_guarded(base, 2 * page, [&] {
      std::span<const std::byte> from_cut(data, 2 * page);
      std::span<const std::byte> from_whole = std::as_bytes(std::span(whole));
      Hasher::update_two(sut, from_cut, beside, from_whole);
    }));
    sut.reset();
    beside.reset();
    sut.update({data, page});
    beside.update(std::as_bytes(std::span(whole)));
    EXPECT_EQ(sut.finish(), digest);
    EXPECT_EQ(beside.finish().to_hex(),
              tensor_hex(kind, spec_of("t", DType::uint8, {whole.size()}), whole));
  }
  munmap(base, 2 * page);
  close(fd);
}

}  // namespace
}  // namespace refit
