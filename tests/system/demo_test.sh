#!/usr/bin/env bash
# Runs the demo on what is built, in a private TMPDIR, and judges it from outside: exit status, report, leftovers.
#
# Usage: demo_test.sh --build-dir DIR verified|offload|sabotage|interrupted
# Each run gives its processes a mark in the environment, so that a survivor is found whoever became its parent.
set -euo pipefail

usage() {
  echo "usage: $0 --build-dir DIR verified|offload|sabotage|interrupted" >&2
  exit 2
}
[[ $# -eq 3 && $1 == --build-dir ]] || usage
build_dir=$2
subject=$3
demo=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/scripts/demo

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/tmp"
export TMPDIR=$work/tmp
export DEMO_TEST_MARK=$work

fail() {
  echo "FAILED: $*" >&2
  sed 's/^/  stdout: /' "$work/stdout" >&2 || true
  sed 's/^/  stderr: /' "$work/stderr" >&2 || true
  exit 1
}

expect_nothing_left() {
  local leftovers pid
  leftovers=$(ls -A "$TMPDIR")
  [[ -z $leftovers ]] || fail "files are left in TMPDIR: $leftovers"
  for environment in /proc/[0-9]*/environ; do
    pid=${environment#/proc/}
    pid=${pid%/environ}
    [[ $pid != "$$" && $pid != "$BASHPID" ]] || continue
    if grep -qz "^DEMO_TEST_MARK=$work$" "$environment" 2> /dev/null &&
      ! grep -q '^PPid:[[:space:]]*'"$$"'$' "/proc/$pid/status" 2> /dev/null; then
      fail "process $pid is left: $(tr '\0' ' ' < "/proc/$pid/cmdline")"
    fi
  done
}

status=0
case "$subject" in
  verified)
    # Goal: exit 0 means what it says. The report is read again here, key by key.
    "$demo" --build-dir "$build_dir" --model tiny --steps 4 --json "$work/report.json" \
      > "$work/stdout" 2> "$work/stderr" || status=$?
    [[ $status -eq 0 ]] || fail "exit status $status instead of 0"
    python3 - "$work/report.json" << 'PYTHON' || fail "the report does not say that every step was verified"
import json, sys
report = json.load(open(sys.argv[1]))
steps = report["steps"]
assert report["verified"] is True and report["error"] is None
assert [step["step"] for step in steps] == [1, 2, 3, 4]
assert all(step["verified"] and step["output_equal"] and not step["mismatches"] for step in steps)
assert all(step["digests_equal"] == step["digests"] == report["tensors"] for step in steps)
assert all(step["changed"] >= 0.99 * step["parameters"] > 0 for step in steps)
assert all(a["version"] < b["version"] for a, b in zip(steps, steps[1:]))
assert len({step["output_sha256"] for step in steps}) == 4
assert steps[-1]["loss"] < report["loss_before"]
assert all(step["refit_s"] > 0 and step["memcpy_s"] > 0 for step in steps)
PYTHON
    grep -q '^verified: 4 of 4 steps' "$work/stdout" || fail "no summary"
    ;;
  offload)
    # Goal: the same with an engine whose blocks come and go: both places hold the trainer's bytes, and the model that
    # runs through them gives the trainer's output.
    "$demo" --build-dir "$build_dir" --model tiny --steps 3 --offload --json "$work/report.json" \
      > "$work/stdout" 2> "$work/stderr" || status=$?
    [[ $status -eq 0 ]] || fail "exit status $status instead of 0"
    python3 - "$work/report.json" << 'PYTHON' || fail "the report does not say that every step was verified"
import json, sys
report = json.load(open(sys.argv[1]))
steps = report["steps"]
assert report["verified"] is True and len(steps) == 3
assert all(step["verified"] and step["output_equal"] and not step["mismatches"] for step in steps)
assert all(step["digests_equal"] == step["digests"] == report["tensors"] for step in steps)
assert all(0 < step["device_digests"] < step["digests"] for step in steps)
PYTHON
    ;;
  sabotage)
    # Goal: a daemon that leaves one tensor out is found by both proofs, and the tensor is named.
    "$demo" --build-dir "$build_dir" --model tiny --steps 2 --sabotage --json "$work/report.json" \
      > "$work/stdout" 2> "$work/stderr" || status=$?
    [[ $status -eq 1 ]] || fail "exit status $status instead of 1"
    python3 - "$work/report.json" "$work/stderr" << 'PYTHON' || fail "the skipped tensor is not what the demo complains of"
import json, sys
report, errors = json.load(open(sys.argv[1])), open(sys.argv[2]).read()
assert report["verified"] is False and len(report["steps"]) == 1
step = report["steps"][0]
assert step["verified"] is False
assert len(step["mismatches"]) == 1 and step["digests_equal"] == step["digests"] - 1
assert step["mismatches"][0] in errors and "NOT VERIFIED: step 1" in errors
assert step["output_equal"] is False
PYTHON
    ;;
  interrupted)
    # Goal: a demo that is ended in the middle takes its processes and files along.
    "$demo" --build-dir "$build_dir" --model tiny --steps 1000000 > "$work/stdout" 2> "$work/stderr" &
    pid=$!
    for ((i = 0; i < 600; ++i)); do
      if grep -q '^step  2/' "$work/stdout" 2> /dev/null || ! kill -0 "$pid" 2> /dev/null; then break; fi
      sleep 0.1
    done
    kill -TERM "$pid" || fail "the demo ended by itself"
    wait "$pid" || status=$?
    [[ $status -eq 143 ]] || fail "exit status $status instead of 143"
    ;;
  *) usage ;;
esac
expect_nothing_left
echo "demo: $subject: as expected"
