#!/usr/bin/env bash
# LongBench v2 to data/longbenchv2/, one JSON row per line. LIMIT: rows (all). More in download.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/download.sh" longbenchv2 "$@"
