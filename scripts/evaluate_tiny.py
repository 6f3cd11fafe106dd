"""Measures a trained small model: `python3 scripts/evaluate_tiny.py --help`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference"))

from dsatrace.commands.evaluate_tiny import main

sys.exit(main())
