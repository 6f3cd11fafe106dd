# Sourced by the other scripts: makes .venv when it is missing, installs the package, activates it.
# PYTHON chooses the interpreter the environment is made with, VENV where it lies; VENV=none takes
# the environment that is active, as it is.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv}"
PYTHON="${PYTHON:-python3}"

# pip does not compile what it installs; without this no process would keep what it compiles of torch.
unset PYTHONDONTWRITEBYTECODE

if [ "$VENV" != none ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $PYTHON is missing or older than 3.10; set PYTHON to a newer one" >&2
        exit 2
    fi
    # Reinstalled only when what it was installed from has changed.
    wanted="$(cksum < "$root/pyproject.toml")"
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing into $VENV (the first time takes a minute or more)"
        [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
        # Not compiled: most modules are never imported, and the others are compiled when they are.
        pip=("$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check)
        # uv unpacks in seconds what takes pip a minute; where it cannot, pip does it, or says why not.
        index="${PIP_INDEX_URL:-$("$VENV/bin/python" -m pip config get global.index-url 2> /dev/null || true)}"
        add() {
            "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" ${index:+--default-index "$index"} "$@" \
                2> /dev/null || "${pip[@]}" "$@"
        }
        "${pip[@]}" uv || true
        # What the kernels need comes first: they compile on the other cores while torch and the rest are unpacked.
        add numba orjson pyarrow
        PYTHONPATH="$root/inference" "$VENV/bin/python" -m dsatrace.commands.warmup > /dev/null 2>&1 &
        # pip has its own settings of where a torch for this machine lies; uv keeps what it finds.
        "${pip[@]}" "$(grep -o 'torch>=[^"]*' "$root/pyproject.toml")"
        add -e "$root[dev]"
        wait $! || true
        echo "$wanted" > "$VENV/.installed"
    fi
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
fi

# Nothing below needs the network.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
