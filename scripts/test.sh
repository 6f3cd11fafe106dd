#!/usr/bin/env bash
# Sets up and runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

ruff check .
ruff format --check .
# mypy keeps one core busy; meanwhile the others compile the kernels, once for all of pytest's workers.
dsatrace warmup > /dev/null 2>&1 &
mypy
wait $!
python -m pytest -n auto --maxprocesses=4 --dist=worksteal "$@"
