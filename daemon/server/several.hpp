// Several errors as one, so that a refusal lists everything that is wrong.
//
// Pure, any thread.
#pragma once

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "refit/result.hpp"

namespace refit::daemon {

/// One error stays as it is. More become one with the first one's code, all messages, and all
/// details sorted; an error without details stands among them by its message. Not for none.
inline Unexpected several(std::vector<Error> errors) {
  if (errors.size() == 1) return Unexpected(std::move(errors.front()));
  Error all{errors.front().code, errors.front().native, {}, {}};
  for (Error& error : errors) {
    all.message += (all.message.empty() ? "" : "; ") + error.message;
    if (error.details.empty()) all.details.push_back(std::move(error.message));
    for (std::string& line : error.details) all.details.push_back(std::move(line));
  }
  std::sort(all.details.begin(), all.details.end());
  return Unexpected(std::move(all));
}

}  // namespace refit::daemon
