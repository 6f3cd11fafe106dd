"""Makes a small random checkpoint for demo and tests: `python3 scripts/make_tiny_checkpoint.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from dsatrace.commands.make_tiny_checkpoint import main

sys.exit(main())
