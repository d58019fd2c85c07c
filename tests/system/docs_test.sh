#!/usr/bin/env bash
# The generated documents are what the binaries say, and the man pages are roff that groff takes without a warning.
#
#   tests/system/docs_test.sh BUILD_DIR
set -euo pipefail
cd "$(dirname "$0")/../.."
scripts/make-docs --check --bin-dir "$1"
for page in docs/man/*.[158]; do
  warnings=$(groff -man -Tutf8 -ww -z "$page" 2>&1) || true
  [ -z "$warnings" ] || { echo "$page: $warnings" >&2; exit 1; }
done
