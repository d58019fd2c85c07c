#!/usr/bin/env bash
# Goal: what is installed has the hardening of cmake/hardening.cmake.
# Method: reads it back from linked files, and from archives or the compile commands what linking does not keep. The
# self-test builds a small program without each flag in turn and expects the complaint that names the flag.
#
#   tests/install/hardening_test.sh FILE...        programs, libraries (.so), archives (.a), compile_commands.json
#   tests/install/hardening_test.sh --self-test
set -euo pipefail

complaints=0
complain() { echo "hardening_test: $*" >&2; complaints=$((complaints + 1)); }

judge_linked() {
  local dynamic segments names
  dynamic=$(readelf --wide --dynamic "$1")
  segments=$(readelf --wide --segments "$1")
  names=$(nm --dynamic --undefined-only "$1")
  grep -qE 'FLAGS_1.* NOW' <<< "$dynamic" || complain "$1: symbols are bound late (-z now)"
  grep -q 'GNU_RELRO' <<< "$segments" || complain "$1: relocations stay writable (-z relro)"
  grep -qE 'GNU_STACK .* RW  ' <<< "$segments" || complain "$1: the stack is executable (-z noexecstack)"
  grep -q '__stack_chk_fail' <<< "$names" || complain "$1: no stack protector (-fstack-protector-strong)"
  grep -qE '_chk(@|$)' <<< "$names" || complain "$1: no checked functions (-D_FORTIFY_SOURCE)"
  [[ ${1##*/} == *.so* ]] || grep -qE 'FLAGS_1.* PIE' <<< "$dynamic" || complain "$1: its address is fixed (-pie)"
  ldd --unused "$1" > /dev/null || complain "$1: needs a library that it does not use (--as-needed)"
}

# A linked file is marked only if the C library's start files are, and Debian's are not.
judge_archive() {
  local members marked
  members=$(ar t "$1" | wc -l)
  marked=$(readelf --wide --notes "$1" 2> /dev/null | grep -c 'IBT, SHSTK' || true)
  [[ $(uname -m) != x86_64 || $members -eq $marked ]] ||
    complain "$1: $((members - marked)) of $members objects do not mark targets of indirect jumps (-fcf-protection)"
}

judge_commands() {
  local without
  without=$(grep -E '"command": .* -c .*/(core|client|daemon)/' "$1" | grep -vc -e -fstack-clash-protection || true)
  [[ $without -eq 0 ]] || complain "$1: $without commands do not probe the stack (-fstack-clash-protection)"
}

judge() {
  case "$1" in
    *.a) judge_archive "$1" ;;
    *.json) judge_commands "$1" ;;
    *) judge_linked "$1" ;;
  esac
}

# $1: words of the complaint that must come, or "nothing"; the rest: arguments of g++ that undo one flag.
expect_complaint() {
  local expected=$1 said
  shift
  g++ -O2 -fPIE -U_FORTIFY_SOURCE -D_FORTIFY_SOURCE=3 -fstack-protector-strong -fcf-protection "$@" \
    -c "$work/small.cpp" -o "$work/small.o"
  g++ -pie -Wl,-z,relro,-z,now,-z,noexecstack,--as-needed "$@" "$work/small.o" -o "$work/small"
  rm -f "$work/small.a"
  ar rc "$work/small.a" "$work/small.o"
  echo "\"command\": \"g++ -fstack-clash-protection $* -c x/core/small.cpp\"" > "$work/small.json"
  [[ $expected != *clash* ]] || echo '"command": "g++ -c x/core/small.cpp"' > "$work/small.json"
  said=$({ judge "$work/small"; judge "$work/small.a"; judge "$work/small.json"; } 2>&1)
  if [[ $expected == nothing ]]; then
    [[ -z $said ]] || { echo "self-test: complains about a hardened program: $said" >&2; exit 1; }
  else
    [[ $said == *"($expected)"* ]] || { echo "self-test: misses $expected; said: ${said:-nothing}" >&2; exit 1; }
  fi
}

if [[ ${1:-} == --self-test ]]; then
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  printf '#include <cstdio>\n#include <cstring>\nint main(int n, char** v) { char b[8]; strcpy(b, v[n - 1]); puts(b); }\n' \
    > "$work/small.cpp"
  expect_complaint nothing
  expect_complaint -D_FORTIFY_SOURCE -U_FORTIFY_SOURCE
  expect_complaint -fstack-protector-strong -fno-stack-protector
  expect_complaint -fcf-protection -fcf-protection=none
  expect_complaint -fstack-clash-protection
  expect_complaint -pie -no-pie
  expect_complaint '-z relro' -Wl,-z,norelro
  expect_complaint '-z now' -Wl,-z,lazy
  expect_complaint '-z noexecstack' -Wl,-z,execstack
  expect_complaint --as-needed -Wl,--no-as-needed
  exit 0
fi

[[ $# -ge 1 ]] || { sed -n '6,7p' "$0"; exit 2; }
for file in "$@"; do
  [[ -e $file ]] || complain "$file: not there"
  judge "$file"
done
[[ $complaints -eq 0 ]]
