#!/usr/bin/env bash
# Goal: no lint is green because it looks at nothing.
# Method: in a copy of the tree that passes, plants a fault for each rule and expects the complaint that names it.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
tar -C "$root" --exclude=./build --exclude=./.git --exclude=./shared -cf - . | tar -C "$work" -xf -
cd "$work"
fail() { echo "lint_test: $*" >&2; exit 1; }

# $1: the command; $2: words of the complaint; $3: a file to write, from stdin; it is taken away afterwards.
expect_red() {
  local said
  mkdir -p "$(dirname "$3")"
  cat > "$3"
  if said=$($1 2>&1); then fail "$1 passes with a fault in $3"; fi
  [[ $said == *"$2"* ]] || fail "$1 fails with $3, but does not say \"$2\": $said"
  rm "$3"
}

# The tree's own sources would only take time; one stays, so that no rule is left without a file.
find core client daemon tests bench examples -name '*.[ch]pp' ! -path core/result.cpp -delete
scripts/lint || fail "the tree does not pass before a fault is planted"

for kind in cpp sh py; do
  expect_red scripts/lint "no CMake target names tests/unit/planted_test.$kind" "tests/unit/planted_test.$kind" < /dev/null
done
# A test of the same name in another folder does not count.
expect_red scripts/lint "no CMake target names tests/unit/planted/demo_test.sh" tests/unit/planted/demo_test.sh < /dev/null
expect_red scripts/lint "the daemon is included from outside" client/src/planted.cpp <<< '#include "server/server.hpp"'
expect_red scripts/lint "core or daemon includes the client" core/planted.cpp <<< '#include "refit/trainer.hpp"'
expect_red scripts/lint "formatting differs" core/planted.cpp <<< 'int  planted( );'
expect_red scripts/lint "SC2086" scripts/planted <<< $'#!/usr/bin/env bash\nls $1'
expect_red scripts/lint "undefined name 'planted'" scripts/planted <<< $'#!/usr/bin/env python3\nprint(planted)'
expect_red scripts/lint "invalid syntax" tests/support/planted.py <<< 'def planted(:'

# The analysers get small files: a compile command for each, and the header that stands for a finished build.
mkdir -p build/release/schema
touch build/release/schema/refit_generated.h
analyse="scripts/analyse core/planted.cpp"
echo "[{\"directory\": \"$work\", \"command\": \"g++ -std=c++20 -c core/planted.cpp\", \"file\": \"core/planted.cpp\"}]" \
  > build/release/compile_commands.json
clean='int planted(int count) { return count + 1; }'
echo "$clean" > core/planted.cpp
$analyse || fail "$analyse does not pass without a fault"
# One run for all of clang-tidy's, whose start takes longer than its work.
cat > core/planted.cpp << 'EOF'
#include <pthread.h>
#include <string>
unsigned long bigger(int* values) { return sizeof(sizeof(values)); }
unsigned long slower(const std::string (&all)[2]) { for (const std::string text : all) return text.size(); return 0; }
unsigned long copied(const std::string text) { return text.size(); }
void stopped(int* old) { pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, old); }
int ignored(int count) { return 1; }
int unset(bool yes) { int count; if (yes) count = 1; else count = 2; return count; }
EOF
if said=$($analyse 2>&1); then fail "$analyse passes with faults in core/planted.cpp"; fi
for rule in bugprone-sizeof-expression performance-for-range-copy concurrency-thread-canceltype-asynchronous \
  misc-unused-parameters cppcoreguidelines-init-variables; do
  [[ $said == *"$rule,-warnings-as-errors"* ]] || fail "$analyse does not fail for $rule: $said"
done
[[ $said == *"[passedByValue]"* ]] || fail "$analyse does not fail for passedByValue: $said"
expect_red "$analyse" '[nullPointer]' core/planted.cpp \
  <<< 'int planted(bool yes) { const int* count = nullptr; if (yes) return 0; return *count; }'
echo "lint_test: every lint was seen red"
