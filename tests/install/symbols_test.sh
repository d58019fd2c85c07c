#!/usr/bin/env bash
# Goal: the shared library shows the listed names and no others.
# Method: compares what it defines with client/refit.symbols, both ways.
#
#   tests/install/symbols_test.sh LIBRARY            fails if they differ
#   tests/install/symbols_test.sh LIBRARY --update   writes the list: for a change that is meant
set -euo pipefail

[[ $# -ge 1 ]] || { sed -n '5,6p' "$0"; exit 2; }
library=$1
list=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/client/refit.symbols
# The version node itself is an absolute symbol; constructors come twice.
shown() {
  nm --dynamic --defined-only --demangle "$library" | grep -v ' A ' | sed -E 's/^[0-9a-f]+ . //' | LC_ALL=C sort -u
}
if [[ ${2:-} == --update ]]; then
  shown > "$list"
else
  diff --label client/refit.symbols --label "$library" -u "$list" <(shown) || {
    echo "symbols_test: what the library shows changed; if that is meant: $0 $library --update" >&2
    exit 1
  }
fi
