// A shell's completion of refitctl's command line.
//
// Pure; any thread. Knows nothing of the option library: options.cpp describes the command line
// that it parses, so that the two cannot drift apart.
#pragma once

#include <string>
#include <vector>

namespace refit::ctl {

/// What may follow an option, or stand as an argument.
enum class ValueKind { none, any, words, file, module, tensor };

struct CompletedOption {
  std::string name;  ///< with its dashes
  ValueKind value = ValueKind::none;
  std::vector<std::string> words;  ///< of ValueKind::words
};

struct CompletedCommand {
  std::string name;  ///< empty: what stands before any command
  std::vector<CompletedOption> options;
  std::vector<ValueKind> arguments;  ///< all that may come next, whichever position
};

/// A script for bash that needs nothing but bash and this program. Names of modules and tensors are
/// asked of the daemon, for half a second at most and without a word if it is not there.
[[nodiscard]] std::string bash_completion(const std::vector<CompletedCommand>& commands);

}  // namespace refit::ctl
