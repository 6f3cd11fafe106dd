"""Answers prompts and traces what DeepSeek Sparse Attention reads; see `--help`."""

import sys

from dsatrace.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
