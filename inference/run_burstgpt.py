"""Serves BurstGPT's arrivals with the traced model; see `--help`."""

import sys

from dsatrace.commands.run_burstgpt import main

if __name__ == "__main__":
    sys.exit(main())
