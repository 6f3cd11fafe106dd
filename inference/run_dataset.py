"""Runs RULER, LongBench v2 or ShareGPT through the traced model; see `--help`."""

import sys

from dsatrace.commands.run_dataset import main

if __name__ == "__main__":
    sys.exit(main())
