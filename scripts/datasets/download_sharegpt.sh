#!/usr/bin/env bash
# ShareGPT's conversations to data/sharegpt/, one JSON row per line. LIMIT: rows (all). More in download.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/download.sh" sharegpt "$@"
