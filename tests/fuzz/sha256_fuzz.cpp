// SHA-256 by the CPU's instructions against OpenSSL: two messages, fed side by side in any pieces.
//
// A libFuzzer target; built where the compiler is clang. Run it without arguments to go on for
// ever.
#include <fuzzer/FuzzedDataProvider.h>
#include <openssl/sha.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <span>
#include <vector>

#include "digest/sha256.hpp"

namespace {

using refit::Sha256;
using Bytes = std::vector<std::uint8_t>;
using Span = std::span<const std::byte>;

void must_equal(const Sha256::Value& value, const Bytes& message) {
  Sha256::Value expected;
  SHA256(message.data(), message.size(), expected.data());
  if (value != expected) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (!Sha256::supported()) return 0;
  FuzzedDataProvider input(data, size);
  const Bytes message_a = input.ConsumeBytes<std::uint8_t>(
      input.ConsumeIntegralInRange<std::size_t>(0, input.remaining_bytes()));
  const Bytes message_b = input.ConsumeBytes<std::uint8_t>(
      input.ConsumeIntegralInRange<std::size_t>(0, input.remaining_bytes()));
  // What is left decides the pieces; when nothing is, each is all the rest.
  const auto piece = [&input](Span& rest) {
    const std::size_t bytes =
        input.remaining_bytes() == 0 ? rest.size() : input.ConsumeIntegral<std::uint8_t>();
    const Span taken = rest.first(std::min(bytes, rest.size()));
    rest = rest.subspan(taken.size());
    return taken;
  };
  Sha256 a, b;
  Span rest_a = std::as_bytes(std::span(message_a));
  Span rest_b = std::as_bytes(std::span(message_b));
  Span of_a, of_b;
  while (!rest_a.empty() || !rest_b.empty() || !of_a.empty() || !of_b.empty()) {
    if (of_a.empty()) of_a = piece(rest_a);
    if (of_b.empty()) of_b = piece(rest_b);
    Sha256::update_two(a, of_a, b, of_b);
    if (!of_a.empty() && !of_b.empty()) std::abort();
  }
  must_equal(a.finish(), message_a);
  must_equal(b.finish(), message_b);
  return 0;
}
