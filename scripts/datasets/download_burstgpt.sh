#!/usr/bin/env bash
# BurstGPT's arrivals to data/burstgpt/burstgpt_train_limit$LIMIT.csv. LIMIT: rows (2000). More in download.sh.
exec "$(dirname "${BASH_SOURCE[0]}")/download.sh" burstgpt "$@"
