#!/usr/bin/env bash
# RULER's rows to data/ruler/<task>/validation_<length>.jsonl. LIMIT: rows in all (all of them). More in download.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/download.sh" ruler "$@"
