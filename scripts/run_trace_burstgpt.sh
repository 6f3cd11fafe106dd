#!/usr/bin/env bash
# BurstGPT's arrivals through the traced model. BURSTGPT_CSV names its file (else data/burstgpt/, the hub, an
# embedded sample), SERVING is fifo-batch or continuous, CLOCK virtual or real; the rest is in run_trace.sh.
# Arguments go to run_burstgpt.py.
set -euo pipefail
TINY_LIMIT=20
. "$(dirname "${BASH_SOURCE[0]}")/run_trace.sh"

flags=(--serving "${SERVING:-fifo-batch}" --clock "${CLOCK:-virtual}")
[ -z "${BURSTGPT_CSV:-}" ] || flags+=(--burstgpt-csv "$BURSTGPT_CSV")
run inference/run_burstgpt.py "${flags[@]}" "$@"
