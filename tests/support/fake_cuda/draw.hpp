// draw: every choice that the fake makes, as a pure function of the seed.
//
// A choice is named by its purpose and a number, not by how many were made before it: what one
// thread or process does cannot change what another one draws.
#pragma once

#include <cstdint>
#include <string_view>

namespace fakecuda {

constexpr std::uint64_t scramble(std::uint64_t value) {
  value += 0x9e37'79b9'7f4a'7c15;
  value = (value ^ (value >> 30)) * 0xbf58'476d'1ce4'e5b9;
  value = (value ^ (value >> 27)) * 0x94d0'49bb'1331'11eb;
  return value ^ (value >> 31);
}

class Draw {
 public:
  constexpr Draw(std::uint64_t seed, std::string_view role, std::string_view purpose,
                 std::uint64_t number)
      : state_(scramble(seed)) {
    for (const char letter : role) stir(static_cast<unsigned char>(letter));
    stir(role.size());
    for (const char letter : purpose) stir(static_cast<unsigned char>(letter));
    stir(number);
  }

  constexpr std::uint64_t next() { return state_ = scramble(state_); }
  constexpr std::uint64_t below(std::uint64_t bound) { return next() % bound; }

 private:
  constexpr void stir(std::uint64_t value) { state_ = scramble(state_ ^ value); }
  std::uint64_t state_;
};

/// Visits 0..count-1 once each in a drawn order, without memory for it.
template <typename Visit>
constexpr void shuffled(std::uint64_t count, Draw draw, Visit&& visit) {
  if (count == 0) return;
  const auto coprime = [count](std::uint64_t a) {
    std::uint64_t b = count;
    while (a != 0) {
      const std::uint64_t rest = b % a;
      b = a;
      a = rest;
    }
    return b == 1;
  };
  std::uint64_t step = 1 + draw.below(count);
  while (!coprime(step)) step = 1 + step % count;
  std::uint64_t index = draw.below(count);
  for (std::uint64_t i = 0; i < count; ++i) {
    visit(index);
    index = (index + step) % count;
  }
}

}  // namespace fakecuda
