#!/usr/bin/env bash
# download.sh NAME: a data set to data/NAME/, as plain files. LIMIT: rows.
# Fetched from the hub, checked by sha256, continued when interrupted. `hf auth login` or HF_TOKEN where a data set
# wants it. Flags go to `dsatrace download`, --help explains them.
set -euo pipefail
offline="${HF_HUB_OFFLINE:-0}"
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export HF_HUB_OFFLINE="$offline" # switched off there for all other scripts

name="$1"
shift
exec dsatrace download "$name" ${LIMIT:+--limit "$LIMIT"} "$@"
