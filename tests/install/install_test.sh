#!/usr/bin/env bash
# Goal: a stranger's project builds against an installed tree and works with the installed daemon.
# Method: installs into a temporary root, moves the prefix, and builds tests/install/outside with find_package and with
# pkg-config, as C++17 and C++20, with g++ and clang++; each program runs with a daemon and without one.
#
#   tests/install/install_test.sh --build-dir BUILD
set -euo pipefail

[[ $# -eq 2 && $1 == --build-dir ]] || { sed -n '5p' "$0"; exit 2; }
build=$2
outside=$(cd "$(dirname "${BASH_SOURCE[0]}")/outside" && pwd)
work=$(mktemp -d)
daemon=
finish() {
  if [[ -n $daemon ]]; then
    kill "$daemon" || true
    wait "$daemon" || true
  fi
  rm -rf "$work"
}
trap finish EXIT
fail() { echo "install_test: $*" >&2; exit 1; }

# DESTDIR keeps the machine as it was, whatever a rule says; the move shows that nothing remembers the first place.
DESTDIR="$work/root" cmake --install "$build" --prefix /opt/refit > "$work/install.log" || fail "$(cat "$work/install.log")"
stray=$(find "$work/root" -type f -not -path "$work/root/opt/refit/*")
[[ -z $stray ]] || fail "installed outside of the prefix: $stray"
prefix="$work/moved"
mv "$work/root/opt/refit" "$prefix"
libdir=$(dirname "$(find "$prefix" -name 'librefit.so')")
for file in bin/refitd bin/refitctl include/refit/trainer.hpp include/refit/types.hpp; do
  [[ -e $prefix/$file ]] || fail "$file is not installed"
done
[[ -e $libdir/librefit.so.0 ]] || fail "librefit.so.0 is not installed"
remembered=$(grep -rlE "/opt/refit|$work|$(cd "$outside/../../.." && pwd)" "$libdir/cmake" "$libdir/pkgconfig" || true)
[[ -z $remembered ]] || fail "these name the prefix or the source tree: $remembered"

export PKG_CONFIG_PATH="$libdir/pkgconfig"
built=()
# $1: standard. Uses find_package.
with_cmake() {
  local folder="$work/cmake-$1"
  if ! cmake -S "$outside" -B "$folder" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_CXX_STANDARD="$1" > "$work/log" 2>&1 ||
    ! cmake --build "$folder" >> "$work/log" 2>&1; then
    fail "find_package, C++$1: $(cat "$work/log")"
  fi
  built+=("$folder/outside")
}
# $1: compiler, $2: standard. Uses pkg-config, and takes no warning from the headers.
with_pkg_config() {
  local program="$work/$1-$2"
  # pkg-config's answer is words.
  # shellcheck disable=SC2046
  "$1" -std="c++$2" -Wall -Wextra -Wconversion -Wsign-conversion -Wshadow -Wpedantic -Werror "$outside/main.cpp" \
    -o "$program" $(pkg-config --cflags --libs refit) -Wl,-rpath,"$libdir" || fail "pkg-config, $1, C++$2"
  built+=("$program")
}
for standard in 17 20; do
  with_cmake "$standard"
  with_pkg_config g++ "$standard"
  with_pkg_config clang++ "$standard"
done

socket="$work/refitd.sock"
"$prefix/bin/refitd" --socket "$socket" 2> "$work/refitd.log" &
daemon=$!
for program in "${built[@]}"; do
  "$program" "$work/nobody.sock" nobody || fail "$program: without a daemon"
done
until "$prefix/bin/refitctl" --socket "$socket" status > /dev/null 2> "$work/refitctl.log"; do
  if ! kill -0 "$daemon" || [[ $SECONDS -gt 240 ]]; then
    fail "the installed refitd does not answer: $(cat "$work/refitd.log" "$work/refitctl.log")"
  fi
done
for program in "${built[@]}"; do
  "$program" "$socket" || fail "$program: with a daemon"
done
echo "${#built[@]} programs built and run"
