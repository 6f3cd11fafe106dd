#!/usr/bin/env bash
# RULER through the traced model. RULER_PATH names its files (else data/ruler/, the hub, the generator),
# RULER_TASK and RULER_LENGTH what to run; the rest is in run_trace.sh. Arguments go to run_dataset.py.
set -euo pipefail
TINY_LIMIT=2
. "$(dirname "${BASH_SOURCE[0]}")/run_trace.sh"

flags=()
[ -z "${RULER_PATH:-}" ] || flags+=(--ruler-path "$RULER_PATH")
[ -z "${RULER_TASK:-}" ] || flags+=(--ruler-task "$RULER_TASK")
[ -z "${RULER_LENGTH:-}" ] || flags+=(--ruler-length "$RULER_LENGTH")
run inference/run_dataset.py --dataset ruler "${flags[@]}" "$@"
