# Sourced by run_trace_*.sh: sets up, finds the checkpoint, and gives `run` the command's first words.
#
#   CKPT_PATH  folder of a converted checkpoint; unset: the tiny trained one of data/models
#   CONFIG     its config; unset: CKPT_PATH/config.json, else inference/config_671B_v3.2.json
#   MP         ranks; unset: the N of its model0-mpN.safetensors
#   LIMIT      requests in all; OUT: the run's folder; arguments of the script go to the runner

hub_offline="${HF_HUB_OFFLINE:-0}"
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$root"
# With a checkpoint of one's own the hub may be asked; the tiny model's run stays offline.
[ -z "${CKPT_PATH:-}" ] || export HF_HUB_OFFLINE="$hub_offline"

fail() {
    echo "error: $1" >&2
    exit 2
}

if [ -z "${CKPT_PATH:-}" ]; then
    for name in CONFIG MP; do
        [ -z "${!name:-}" ] || fail "$name=${!name} without CKPT_PATH; name the checkpoint it belongs to"
    done
    CKPT_PATH=data/demo/converted
    CONFIG=data/models/needle-2k/serving_config.json
    if [ ! -f "$CKPT_PATH/model0-mp1.safetensors" ]; then
        python inference/convert.py --hf-ckpt-path data/models/needle-2k --save-path "$CKPT_PATH" \
            --n-experts 4 --model-parallel 1 > /dev/null
    fi
    echo "== no CKPT_PATH: needle-2k, a tiny model that looks things up and knows no language (data/models)"
    LIMIT="${LIMIT:-$TINY_LIMIT}"
    tiny=1
fi

shopt -s nullglob
shards=("$CKPT_PATH"/model0-mp*.safetensors)
shopt -u nullglob
[ "${#shards[@]}" -gt 0 ] || fail "CKPT_PATH=$CKPT_PATH: holds no model0-mpN.safetensors; convert a checkpoint first"
if [ -z "${MP:-}" ]; then
    [ "${#shards[@]}" -eq 1 ] || fail "CKPT_PATH=$CKPT_PATH: converted for several numbers of ranks; set MP to one"
    MP="${shards[0]##*-mp}"
    MP="${MP%.safetensors}"
fi
[ -f "$CKPT_PATH/model0-mp$MP.safetensors" ] ||
    fail "MP=$MP: $CKPT_PATH has no model0-mp$MP.safetensors but ${shards[*]##*/}; set MP to that or convert again"
if [ -z "${CONFIG:-}" ]; then
    CONFIG="$CKPT_PATH/config.json"
    [ -f "$CONFIG" ] || CONFIG=inference/config_671B_v3.2.json
fi

run() { # run SCRIPT FLAG...
    local launch=(python)
    [ "$MP" -eq 1 ] || launch=(torchrun --standalone --nproc-per-node "$MP") # on a free port
    local flags=(--ckpt-path "$CKPT_PATH" --config "$CONFIG")
    [ -z "${LIMIT:-}" ] || flags+=(--limit "$LIMIT")
    [ -z "${OUT:-}" ] || flags+=(--trace-out "$OUT")
    "${launch[@]}" "$@" "${flags[@]}"
}
