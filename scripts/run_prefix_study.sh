#!/usr/bin/env bash
# The whole prefix-sharing study on this machine's CPU: traces, single turn against multi turn, every
# definition of a hit rate, each workload by itself, the sweep over policies, and the mixed cache.
#
#   scripts/run_prefix_study.sh                          the embedded sample and the seeded generators
#   scripts/run_prefix_study.sh --data-path chats.json --tokenizer converted --max-conversations 1000
#
# Takes --data-path (ShareGPT conversations), --tokenizer (alias --model), --max-conversations, --num-blocks
# (256) and --skip-visualization. OUT chooses the folder (a new one), REQUESTS how many requests each
# generator makes (300).
set -eo pipefail # not -u: before bash 4.4 an empty array counts as unset

data=() tokenizer=() limit=() pictures=()
num_blocks=256
while [ $# -gt 0 ]; do
    case "$1" in
    --data-path | --tokenizer | --model | --max-conversations | --num-blocks)
        [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
        ;;
    esac
    case "$1" in
    --data-path) data=(--data-path "$2") ;;
    --tokenizer | --model) tokenizer=(--tokenizer "$2") ;;
    --max-conversations) limit=(--max-conversations "$2") ;;
    --num-blocks) num_blocks="$2" ;;
    --skip-visualization) pictures=(--skip-visualization); shift; continue ;;
    -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//p;}' "$0"; exit 0 ;;
    *) echo "error: unknown option $1; see --help" >&2; exit 2 ;;
    esac
    shift 2
done

. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
out="${OUT:-$root/outputs/prefix_study_$(date +%Y%m%d_%H%M%S)}"
requests="${REQUESTS:-300}"
common=("${tokenizer[@]}" "${pictures[@]}")
conversations=("${data[@]}" "${limit[@]}")
study() { echo; echo "== dsatrace study $*"; dsatrace study "$@"; }

study prepare "${conversations[@]}" "${tokenizer[@]}" --output-dir "$out/traces"
study compare "${conversations[@]}" "${common[@]}" --output-dir "$out/compare"
study compare "${conversations[@]}" "${common[@]}" --num-blocks "$num_blocks" --output-dir "$out/compare_small"
study explain --trace-file "$out/traces/multi_turn_trace.jsonl" "${tokenizer[@]}" --output-dir "$out/explain"
for workload in chat_single chat_multi qa summarization; do
    source=(--workload "$workload" --max-conversations "$requests")
    case "$workload" in
    chat_*) [ ${#data[@]} = 0 ] || source=("${conversations[@]}") ;;
    esac
    mode=multi_turn
    [ "$workload" != chat_single ] || mode=single_turn
    study run "${source[@]}" --mode "$mode" "${common[@]}" --num-blocks "$num_blocks" --write-accesses \
        --output-dir "$out/run_$workload"
done
study sweep "${conversations[@]}" "${common[@]}" --num-requests "$requests" --output-dir "$out/sweep"
study mixed "${conversations[@]}" "${common[@]}" --num-requests "$requests" --num-blocks "$num_blocks" \
    --output-dir "$out/mixed"
echo
echo "== all results: $out (the *_trace.jsonl files hold text and are readable by their owner only)"
