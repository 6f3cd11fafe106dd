#!/usr/bin/env bash
# Every check that needs a CUDA device, within eight minutes, the most valuable first; prints a table as it
# goes. Takes the environment that is active: torch, numpy, numba, safetensors, pyarrow.
#
#   scripts/gpu_checks.sh                      # exit 2 without a device, 1 if a check fails or is left over
#   scripts/gpu_checks.sh --device cpu         # the same code at small shapes, which tests this script
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root/inference:$root/scripts/bench${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/scripts/gpu_checks.py" "$@"
