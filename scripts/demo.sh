#!/usr/bin/env bash
# From nothing to a result, on this machine's CPU: a tiny trained model finds needles in 2K tokens, and the
# trace says what its indexer read. Offline once installed. OUT chooses the run's folder.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

model=data/models/needle-2k
config="$model/serving_config.json"
work=data/demo
out="${OUT:-outputs/demo_$(date +%Y%m%d_%H%M%S)}"
mkdir -p "$work"

echo "== 1. a tiny DeepSeek-V3.2 of our own training ($model/README.md), converted as the real one is"
[ -f "$work/converted/model0-mp1.safetensors" ] || python inference/convert.py \
    --hf-ckpt-path "$model" --save-path "$work/converted" --n-experts 4 --model-parallel 1

echo "== 2. a needle in about 2K tokens, and the answer"
dsatrace warmup --for trace
dsatrace needle --tokenizer "$work/converted" --tokens 2000 --seed 3 --out "$work/prompt.txt"
python inference/generate.py --ckpt-path "$work/converted" --config "$config" --device cpu \
    --input-file "$work/prompt.txt" --max-new-tokens 16 --temperature 0

# Eight needles for the run $1; further flags say how the model goes on. What it says is the report's, too.
needles() {
    local run="$1"
    shift
    python inference/run_dataset.py --ckpt-path "$work/converted" --config "$config" --device cpu \
        --dataset ruler --ruler-generate --ruler-task niah_single_1,niah_multikey_2 --ruler-length 2048 --limit 8 \
        "$@" --trace-out "$run" > "$work/said.txt"
}

echo "== 3. eight RULER needles, traced: was the answer among the 192 tokens that each step reads? Layer 1 looks it up"
needles "$out" --max-new-tokens 16
dsatrace report "$out"

echo "== 4. whether that is so: every record re-derived by the second implementation"
dsatrace verify "$out"

echo "== 5. the same needles, but each answer goes on for 64 decode steps: what would a smaller fast memory miss?"
needles "${out}_64" --min-new-tokens 65 --max-new-tokens 65
dsatrace report "${out}_64" --html "${out}_64/page.html"
