// A shell's completion. Pure; any thread. Knows nothing of the option library.
#include "refitctl/completion.hpp"

namespace refit::ctl {
namespace {

// Live names go through `read` and printf %q, never through `compgen -W`, which would run what a
// name says between $( and ).
constexpr const char* kHead =
    R"(# Completion of refitctl for bash, made by `refitctl --print-completion bash`.

# Adds what of the lines on standard input begins with $1, quoted for the shell.
_refitctl_add() {
  local line quoted
  while IFS= read -r line; do
    [[ $line == "$1"* ]] || continue
    printf -v quoted %q "$line"
    COMPREPLY+=("$quoted")
  done
}

# Asks the daemon; silent where there is none.
_refitctl_ask() {
  "$program" "${socket[@]}" --timeout 0.5 "$@" --names 2>/dev/null
}

# Names of files, which readline quotes by itself.
_refitctl_files() {
  local line
  compopt -o filenames 2>/dev/null
  while IFS= read -r line; do
    COMPREPLY+=("$line")
  done < <(compgen -f -- "$cur")
}

_refitctl_value() {
  case $1 in
    file) _refitctl_files ;;
    module) [[ $target ]] || _refitctl_add "$cur" < <(_refitctl_ask modules) ;;
    tensor) [[ $target ]] && _refitctl_add "$cur" < <(_refitctl_ask tensors "$target") ;;
    words:*) _refitctl_add "$cur" < <(tr '|' '\n' <<< "${1#words:}") ;;
  esac
}
)";

constexpr const char* kTail = R"(
_refitctl() {
  local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}
  local program=${COMP_WORDS[0]} command= target= word kind i
  local -a socket=()
  COMPREPLY=()
  # Bash splits --option=value at the sign.
  if [[ $cur == = ]]; then
    cur=
  elif [[ $prev == = ]]; then
    prev=${COMP_WORDS[COMP_CWORD-2]}
  fi
  for ((i = 1; i < COMP_CWORD; i++)); do
    word=${COMP_WORDS[i]}
    if [[ $word == -* ]]; then
      kind=$(_refitctl_option "$command" "$word")
      [[ $kind && $kind != none ]] || continue
      [[ ${COMP_WORDS[i+1]} == = ]] && ((i++))
      ((i++))
      [[ $word == --socket ]] && socket=(--socket "${COMP_WORDS[i]}")
      [[ $word == --target ]] && target=${COMP_WORDS[i]}
    elif [[ ! $command ]]; then
      command=$word
    elif [[ ! $target && $word == */* ]]; then
      target=$word
    fi
  done
  if [[ $prev == -* ]]; then
    kind=$(_refitctl_option "$command" "$prev")
    case $kind in
      ''|none) ;;
      any) return ;;
      *) _refitctl_value "$kind"; return ;;
    esac
  fi
  if [[ $cur == -* ]]; then
    _refitctl_add "$cur" < <(_refitctl_options "$command")
  else
    for kind in $(_refitctl_arguments "$command"); do
      _refitctl_value "$kind"
    done
  fi
}

complete -F _refitctl refitctl
)";

std::string kind_word(const CompletedOption& option) {
  switch (option.value) {
    case ValueKind::none:
      return "none";
    case ValueKind::any:
      return "any";
    case ValueKind::file:
      return "file";
    case ValueKind::module:
      return "module";
    case ValueKind::tensor:
      return "tensor";
    case ValueKind::words:
      break;
  }
  std::string text = "words:";
  for (std::size_t i = 0; i < option.words.size(); ++i)
    text += (i == 0 ? "" : "|") + option.words[i];
  return text;
}

// Branches of `case "$command $option"`; an option of no command goes with every one.
std::string option_cases(const CompletedCommand& command) {
  const std::string name = command.name.empty() ? "*" : command.name;
  std::string text;
  for (const CompletedOption& option : command.options)
    text += "    " + name + "\\ " + option.name + ") echo '" + kind_word(option) + "' ;;\n";
  return text;
}

}  // namespace

std::string bash_completion(const std::vector<CompletedCommand>& commands) {
  std::string kinds =
      "\n# What follows an option: $1 is the command, $2 the option.\n"
      "_refitctl_option() {\n  case \"$1 $2\" in\n";
  std::string options =
      "\n# The options of a command, one a line.\n"
      "_refitctl_options() {\n  case $1 in\n";
  std::string arguments =
      "\n# What may stand as an argument of a command.\n"
      "_refitctl_arguments() {\n  case $1 in\n";
  std::string common;
  std::string names;
  for (const CompletedCommand& command : commands) {
    std::string list;
    for (const CompletedOption& option : command.options) list += " " + option.name;
    kinds += option_cases(command);
    if (command.name.empty()) {
      common = list;
      continue;
    }
    names += (names.empty() ? "" : "|") + command.name;
    options += "    " + command.name + ") printf '%s\\n'" + list + " ;;\n";
    std::string words;
    for (const ValueKind kind : command.arguments) words += " " + kind_word({"", kind, {}});
    arguments += "    " + command.name + ") echo" + words + " ;;\n";
  }
  kinds += "  esac\n}\n";
  options += "  esac\n  printf '%s\\n'" + common + "\n}\n";
  arguments += "    *) echo 'words:" + names + "' ;;\n  esac\n}\n";
  return kHead + kinds + options + arguments + kTail;
}

}  // namespace refit::ctl
