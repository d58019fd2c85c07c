#!/usr/bin/env bash
# The units as they are installed: no complaint of systemd-analyze, and an exposure that stays below the bound.
#
# Usage: units_test.sh --build-dir DIR
# Installs into a private root. Parses and scores only; systemd_test.py runs them.
set -euo pipefail

[[ $# -eq 2 && $1 == --build-dir ]] || {
  echo "usage: $0 --build-dir DIR" >&2
  exit 2
}
build_dir=$2
host_exposure_max=10 # tenths, as systemd-analyze counts
gpu_exposure_max=15

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
  echo "FAILED: $*" >&2
  exit 1
}
command -v systemd-analyze > /dev/null || fail "no systemd-analyze here; scripts/setup installs it (package systemd)"

DESTDIR=$work/root cmake --install "$build_dir" > "$work/install.log" || {
  cat "$work/install.log" >&2
  fail "cmake --install"
}
prefix=$work/root$(sed -n 's/^CMAKE_INSTALL_PREFIX:PATH=//p' "$build_dir/CMakeCache.txt")
system=$prefix/lib/systemd/system

# Only the named units are judged: those that they depend on belong to a root of systemd's.
verify() { # ROOT
  local unit
  for unit in refitd.socket refitd.service; do
    systemd-analyze --root="$1" --man=no --recursive-errors=no verify "$unit" 2>&1
  done
}
exposure_ok() { # ROOT BOUND
  systemd-analyze --root="$1" --offline=true --threshold="$2" --no-pager security refitd.service > "$work/exposure"
}

complaints=$(verify "$work/root") || fail "the system units: $complaints"
[[ -z $complaints ]] || fail "the system units: $complaints"
exposure_ok "$work/root" "$host_exposure_max" || fail "exposure of the system unit: $(tail -n 1 "$work/exposure")"
echo "system unit: $(tail -n 1 "$work/exposure")"

# systemd-analyze takes no other root for user units; their directives are the system manager's.
cp -r "$work/root" "$work/user"
user=$work/user${system#"$work/root"}
rm -r "$user"
mv "${user%/system}/user" "$user"
complaints=$(verify "$work/user") || fail "the user units: $complaints"
[[ -z $complaints ]] || fail "the user units: $complaints"

# Goal: the gate closes. Method: one line weakened, one misspelt, one that a newer systemd would know.
cp "$system/refitd.service" "$work/good"
sed -i '/^SystemCallFilter=/d' "$system/refitd.service"
! exposure_ok "$work/root" "$host_exposure_max" || fail "a unit without SystemCallFilter= passed the exposure bound"
for edit in 's/^PrivateTmp=/PrivatTmp=/' 's/^Type=notify$/Type=notify-reload/'; do
  sed "$edit" "$work/good" > "$system/refitd.service"
  ! cmp -s "$work/good" "$system/refitd.service" || fail "$edit changed nothing"
  ! verify "$work/root" > "$work/complaints" || fail "systemd-analyze did not mind $edit: $(cat "$work/complaints")"
done
cp "$work/good" "$system/refitd.service"

mkdir "$system/refitd.service.d"
cp "$prefix/share/doc/refit/refitd.service.d/gpu.conf" "$system/refitd.service.d/"
complaints=$(verify "$work/root") || fail "the unit with its GPU drop-in: $complaints"
[[ -z $complaints ]] || fail "the unit with its GPU drop-in: $complaints"
exposure_ok "$work/root" "$gpu_exposure_max" || fail "exposure with the GPU drop-in: $(tail -n 1 "$work/exposure")"
echo "with the GPU drop-in: $(tail -n 1 "$work/exposure")"
