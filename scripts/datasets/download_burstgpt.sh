#!/usr/bin/env bash
# BurstGPT's arrivals to data/burstgpt/burstgpt_train_limit$LIMIT.csv. LIMIT: rows (2000).
# Fetched from the hub, checked by sha256, continued when interrupted. HF_TOKEN is used if set; flags go to
# `dsatrace download`, --help tells them.
set -euo pipefail
offline="${HF_HUB_OFFLINE:-0}"
. "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
export HF_HUB_OFFLINE="$offline" # switched off there for all other scripts

exec dsatrace download burstgpt ${LIMIT:+--limit "$LIMIT"} "$@"
