#!/usr/bin/env bash
# From nothing to a result: a tiny random model answers a 2K-token needle prompt on this machine's CPU,
# and the trace says what its indexer read. Offline once installed. OUT chooses the run's folder.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"

config=inference/config_tiny.json
work=data/demo
out="${OUT:-outputs/demo_$(date +%Y%m%d_%H%M%S)}"
mkdir -p "$work"

echo "== 1. a tiny DeepSeek-V3.2: the real architecture, random weights"
python scripts/make_tiny_checkpoint.py --out "$work/hf" --config "$config"

echo "== 2. converted as the real one is"
python inference/convert.py --hf-ckpt-path "$work/hf" --save-path "$work/converted" --n-experts 8 --model-parallel 1

echo "== 3. a needle in about 2K tokens"
dsatrace needle --tokenizer "$work/converted" --tokens 2048 --out "$work/prompt.txt"

echo "== 4. generation, traced (random weights: the answer is noise)"
python inference/generate.py --ckpt-path "$work/converted" --config "$config" --device cpu \
    --input-file "$work/prompt.txt" --max-new-tokens 64 --temperature 0 --trace-out "$out"

echo "== 5. what it read"
dsatrace report "$out"

echo "== 6. whether that is so: every record re-derived by the second implementation"
dsatrace verify "$out"
