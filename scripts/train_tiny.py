"""Trains the small model that finds needles: `python3 scripts/train_tiny.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from dsatrace.commands.train_tiny import main

sys.exit(main())
