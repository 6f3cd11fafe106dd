"""Converts a Hugging Face checkpoint to one file a rank: `python3 convert.py --help`."""

import sys

from dsatrace.commands.convert import main

sys.exit(main())
