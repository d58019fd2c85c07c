#include "refit/types.hpp"

#include <sys/random.h>

#include <cstdio>

namespace refit {
namespace {

int hex_value(char c) noexcept {
  if (c >= '0' && c <= '9') return c - '0';
  if (c >= 'a' && c <= 'f') return c - 'a' + 10;
  if (c >= 'A' && c <= 'F') return c - 'A' + 10;
  return -1;
}

}  // namespace

std::string shape_repr(const Dims& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i > 0) text += ", ";
    text += std::to_string(shape[i]);
  }
  if (shape.size() == 1) text += ",";
  return text + ")";
}

TransactionId TransactionId::random() {
  TransactionId id;
  // getrandom cannot fail for 16 bytes once the pool is seeded; a short read would only weaken
  // uniqueness, and a zero id is no transaction, hence the loop.
  while (id.is_zero()) {
    if (getrandom(&id, sizeof id, 0) != static_cast<ssize_t>(sizeof id)) id = TransactionId{};
  }
  return id;
}

std::string TransactionId::to_string() const {
  char text[33];
  std::snprintf(text, sizeof text, "%016llx%016llx", static_cast<unsigned long long>(high),
                static_cast<unsigned long long>(low));
  return text;
}

std::string Digest::to_hex() const {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  text.reserve(std::size_t{2} * length);
  for (std::size_t i = 0; i < length && i < bytes.size(); ++i) {
    text += kDigits[bytes[i] >> 4];
    text += kDigits[bytes[i] & 15];
  }
  return text;
}

std::optional<Digest> Digest::from_hex(std::string_view hex) {
  if (hex.size() != 64 && hex.size() != 32) return std::nullopt;
  Digest digest;
  digest.length = static_cast<std::uint8_t>(hex.size() / 2);
  for (std::size_t i = 0; i < digest.length; ++i) {
    const int high = hex_value(hex[2 * i]);
    const int low = hex_value(hex[2 * i + 1]);
    if (high < 0 || low < 0) return std::nullopt;
    digest.bytes[i] = static_cast<std::uint8_t>(high * 16 + low);
  }
  return digest;
}

}  // namespace refit
