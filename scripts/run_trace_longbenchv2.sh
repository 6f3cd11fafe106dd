#!/usr/bin/env bash
# LongBench v2 through the traced model. LONGBENCH_JSON names its file (else data/longbenchv2/, the hub, an
# embedded sample), MAX_PROMPT_TOKENS the longest prompt; the rest is in run_trace.sh. Arguments go to
# run_dataset.py.
set -euo pipefail
TINY_LIMIT=3
. "$(dirname "${BASH_SOURCE[0]}")/run_trace.sh"

flags=()
[ -z "${LONGBENCH_JSON:-}" ] || flags+=(--longbenchv2-json "$LONGBENCH_JSON")
[ -z "${MAX_PROMPT_TOKENS:-}" ] || flags+=(--max-prompt-tokens "$MAX_PROMPT_TOKENS")
[ -z "${tiny:-}" ] || flags+=(--max-new-tokens 16)
run inference/run_dataset.py --dataset longbenchv2 "${flags[@]}" "$@"
