#!/usr/bin/env bash
# RULER's rows to data/ruler/<task>/validation_<length>.jsonl. LIMIT: rows of each file (all). More in download.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/download.sh" ruler "$@"
