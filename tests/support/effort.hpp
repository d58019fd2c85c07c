#pragma once

namespace refit::test {

#ifdef REFIT_SANITIZED
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

/// Rounds of a loop: all of them, or a tenth in a build with a sanitizer, where each takes ten
/// times as long and a few find what many find.
constexpr unsigned rounds(unsigned all) { return kSanitized ? (all + 9) / 10 : all; }

}  // namespace refit::test
