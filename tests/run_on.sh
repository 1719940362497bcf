#!/usr/bin/env bash
# The tests on one version of torch, in a virtual environment of their own: tests/run_on.sh 2.7.0 [pytest arguments]
# PYTHON names the interpreter (default python3).
set -euo pipefail
version=${1:?which version of torch?}; shift
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
"$folder/bin/pip" install -q "torch==$version" -e ".[dev]"
OMP_NUM_THREADS=1 "$folder/bin/python" -m pytest "$@"
