#!/usr/bin/env bash
# Goal: what is installed has the hardening of cmake/hardening.cmake.
# Method: reads it back from the linked files, and from the objects what linking does not keep.
#
#   tests/install/hardening_test.sh FILE...    programs, shared libraries (.so) and archives (.a)
#   tests/install/hardening_test.sh --self-test    each flag is left out once, and must be missed
set -euo pipefail

complaints=0
complain() { echo "hardening_test: $*" >&2; complaints=$((complaints + 1)); }

judge_linked() {
  local dynamic segments names
  dynamic=$(readelf --wide --dynamic "$1")
  segments=$(readelf --wide --segments "$1")
  names=$(nm --dynamic --undefined-only "$1")
  grep -qE '\(BIND_NOW\)|FLAGS_1.* NOW' <<< "$dynamic" || complain "$1: symbols are bound late (-z now)"
  grep -q 'GNU_RELRO' <<< "$segments" || complain "$1: relocations stay writable (-z relro)"
  grep -qE 'GNU_STACK .* RW  ' <<< "$segments" || complain "$1: the stack is executable (-z noexecstack)"
  grep -q '__stack_chk_fail' <<< "$names" || complain "$1: no stack protector (-fstack-protector-strong)"
  grep -qE '__[a-z]+_chk' <<< "${names//__stack_chk_fail/}" || complain "$1: no checked functions (_FORTIFY_SOURCE)"
  [[ $1 == *.so* ]] || grep -qE 'FLAGS_1.* PIE' <<< "$dynamic" || complain "$1: not position-independent (PIE)"
  # Every library that is needed is used. ldd exits 1 if one is not.
  ldd --unused "$1" > /dev/null || complain "$1: needs a library that it does not use (--as-needed)"
}

judge_archive() {
  local members marked probes
  members=$(ar t "$1" | wc -l)
  marked=$(readelf --wide --notes "$1" 2> /dev/null | grep -c 'IBT, SHSTK' || true)
  [[ $(uname -m) != x86_64 || $members -eq $marked ]] ||
    complain "$1: $((members - marked)) of $members objects do not mark indirect targets (-fcf-protection)"
}
