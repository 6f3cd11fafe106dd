# Sourced by the other scripts: makes .venv when it is missing, installs the package, activates it.
# PYTHON chooses the interpreter the environment is made with, VENV where it lies; VENV=none takes
# the environment that is active, as it is.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv}"
PYTHON="${PYTHON:-python3}"

if [ "$VENV" != none ]; then
    if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        echo "error: $PYTHON is missing or older than 3.10; set PYTHON to a newer one" >&2
        exit 2
    fi
    # Reinstalled only when what it was installed from has changed.
    wanted="$(cksum < "$root/pyproject.toml")"
    if [ "$(cat "$VENV/.installed" 2>/dev/null)" != "$wanted" ]; then
        echo "== installing into $VENV (the first time takes a few minutes)"
        [ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
        # Not compiled: most modules are never imported, and the others are compiled when they are.
        "$VENV/bin/python" -m pip install --quiet --no-compile --disable-pip-version-check -e "$root[dev]"
        echo "$wanted" > "$VENV/.installed"
    fi
    # shellcheck disable=SC1091
    . "$VENV/bin/activate"
fi

# pip did not compile what it installed; without this no process would keep what it compiles of torch.
unset PYTHONDONTWRITEBYTECODE
# pip did not compile what it installed; without this no process would keep what it compiles of torch.
unset PYTHONDONTWRITEBYTECODE
# Nothing below needs the network.
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
