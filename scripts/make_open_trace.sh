#!/usr/bin/env bash
# Makes the open trace again: what needle-2k selects over 64 decode steps at 2K, 4K and 8K tokens of context.
# Offline, on a CPU. RUNS is the folder for the recorded runs, OUT that for their exports to Parquet.
# An answer of needle-2k has four tokens; --min-new-tokens makes it go on, and requests.jsonl says where the
# answer ended (answer_tokens). --trace-keep-order: positions in score order, as a GPU kernel gets them.
# --trace-prefill last: the prompt's last row too, from which a warm buffer may start.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

model=data/models/needle-2k
runs="${RUNS:-outputs/needle-2k}"
out="${OUT:-data/traces/needle-2k}"
ckpt="$runs/converted"

[ -f "$ckpt/model0-mp1.safetensors" ] || python inference/convert.py \
    --hf-ckpt-path "$model" --save-path "$ckpt" --n-experts 4 --model-parallel 1
for length in ${LENGTHS:-2048 4096 8192}; do
    name="$((length / 1024))k"
    python inference/run_dataset.py --ckpt-path "$ckpt" --config "$model/serving_config.json" --device cpu \
        --dataset ruler --ruler-generate --ruler-task niah_single_1,niah_multikey_2 --ruler-length "$length" \
        --limit-per-task "${PER_TASK:-4}" --min-new-tokens 65 --max-new-tokens 65 \
        --trace-level full --trace-keep-order --trace-prefill last --trace-out "$runs/$name"
    dsatrace verify "$runs/$name"
    dsatrace export "$runs/$name" --to parquet --out "$out/$name"
done
