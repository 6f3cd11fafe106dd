#!/usr/bin/env bash
# Sets up and runs every check: lint, format, types, tests. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

ruff check .
ruff format --check .
# mypy keeps one core busy; meanwhile the others compile, once for all of pytest's workers: the kernels, and in
# a new checkout the tests with all that they import.
{
    dsatrace warmup
    [ -d tests/__pycache__ ] || python -m pytest --collect-only "$@" || true
} > /dev/null 2>&1 &
mypy ${CI:+--cache-dir=/dev/null} # who runs it once needs no cache
wait $!
# One worker more than cores: some tests wait, for a server, a timeout or a pause. The slowest thirty are named.
python -m pytest --durations=30 -n "$(($(nproc) < 4 ? $(nproc) + 1 : 5))" --dist=worksteal "$@"
