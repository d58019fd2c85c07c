// Result and Error: how every fallible function of this project answers.
//
// Three classes, kept apart: an outcome (expected, documented: its own Errc), an environment
// failure (Errc::os or Errc::cuda with the native code) and a bug of our own (REFIT_ASSERT, never
// used on bytes that a peer can write).
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>
#include <tl/expected.hpp>
#include <utility>
#include <vector>

#include "refit/api.hpp"
#include "refit/errc.hpp"

namespace refit {

struct Error {
  Errc code = Errc::ok;
  int native = 0;       ///< errno or CUresult where code is os or cuda, else 0
  std::string message;  ///< what was wrong, where, and what to do; names the tensor, module or file
  std::vector<std::string>
      details;  ///< one line each, complete and sorted, where several things were wrong

  /// Code, message and details as one text for a person.
  [[nodiscard]] std::string to_string() const {
    std::string text(errc_name(code));
    text += ": " + message;
    for (const std::string& line : details) text += "\n  " + line;
    return text;
  }
};

template <typename T>
using Result = tl::expected<T, Error>;

using Unexpected = tl::unexpected<Error>;

/// An outcome. Allocates its message.
[[nodiscard]] inline Unexpected fail(Errc code, std::string message,
                                     std::vector<std::string> details = {}) {
  return Unexpected(Error{code, 0, std::move(message), std::move(details)});
}

/// An environment failure: `what` names the call and its object, `native` is errno.
[[nodiscard]] REFIT_API Unexpected fail_os(const std::string& what, int native);

}  // namespace refit

#define REFIT_CONCAT_INNER(a, b) a##b
#define REFIT_CONCAT(a, b) REFIT_CONCAT_INNER(a, b)

/// Returns the error of `expression` from the enclosing function; does nothing when it holds a
/// value.
#define REFIT_TRY(expression)                                          \
  do {                                                                 \
    if (auto refit_try_result = (expression); !refit_try_result)       \
      return ::refit::Unexpected(std::move(refit_try_result).error()); \
  } while (false)

/// Declares `declaration` from the value of `expression`, or returns its error.
#define REFIT_TRY_ASSIGN(declaration, expression)                                      \
  auto REFIT_CONCAT(refit_try_, __LINE__) = (expression);                              \
  if (!REFIT_CONCAT(refit_try_, __LINE__))                                             \
    return ::refit::Unexpected(std::move(REFIT_CONCAT(refit_try_, __LINE__)).error()); \
  declaration = std::move(*REFIT_CONCAT(refit_try_, __LINE__))

/// An invariant of our own state, on in every build. Never for anything that a peer can write.
#define REFIT_ASSERT(condition)                                                             \
  do {                                                                                      \
    if (!(condition)) {                                                                     \
      std::fprintf(stderr, "<2>refit: broken invariant at %s:%d: %s\n", __FILE__, __LINE__, \
                   #condition);                                                             \
      std::abort();                                                                         \
    }                                                                                       \
  } while (false)
