"""Writes a small synthetic trace with nothing installed: `python3 -S inference/sanity_trace_no_torch.py`."""

import sys

from dsatrace.commands.sanity import main

if __name__ == "__main__":
    sys.exit(main())
