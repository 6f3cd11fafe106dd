"""`python -m dsatrace` is the `dsatrace` command."""

import sys

from dsatrace.cli import main

if __name__ == "__main__":
    sys.exit(main())
