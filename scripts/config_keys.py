"""Checks that every attribute of the installed transformers' config classes has a row in the table of keys.

Exits 1 and names those that have none.

    python3 scripts/config_keys.py            # walk
    python3 scripts/config_keys.py --write    # and write docs/config.md anew
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from dsatrace.model.hf_config import KEYS, QUANTIZATION_KEYS, ROPE_KEYS, Row

DOCS = Path(__file__).resolve().parents[1] / "docs" / "config.md"

HEAD = """# Which config.json is read, and how

<!-- Written by scripts/config_keys.py --write, from inference/dsatrace/model/hf_config.py. -->

DeepSeek-V3.2 (`deepseek_v32`) and GLM-5 (`glm_moe_dsa`) run here. Every key of their `config.json` is
understood in one of the ways below. A key that is not in these tables, or has another value, ends
`convert.py` and every run with one line that names it. `--ignore-config-key NAME` reads the file as if
that key were not there (`outer.inner` for a nested one); the name then stands in the manifest, under
`model_config.ignored_config_keys`. Both spellings are read, transformers 4's and 5's; where both stand
and differ, the file is refused.

Not in any config.json, and on by default, are three roundings of the released model: fp8 indexer keys,
their Hadamard transform, and latents rounded to fp8. `--numerics plain` turns all three off;
transformers has none.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write docs/{DOCS.name} anew")
    if parser.parse_args().write:
        DOCS.write_text(document(), encoding="utf-8")
        print(f"{DOCS}: {len(KEYS) + len(ROPE_KEYS) + len(QUANTIZATION_KEYS)} keys")
    return walk()


def walk() -> int:
    """Compares the table with the installed transformers; returns the exit code."""
    import transformers

    missing = 0
    for name in ("DeepseekV32Config", "GlmMoeDsaConfig"):
        attributes = set(getattr(transformers, name)().to_dict())
        unknown = sorted(attributes - set(KEYS))
        missing += len(unknown)
        without = f"; without a row: {', '.join(unknown)}" if unknown else ", each in the table"
        print(f"transformers {transformers.__version__} {name}: {len(attributes)} attributes{without}")
    return 1 if missing else 0


def document() -> str:
    """docs/config.md."""
    tables = (
        ("Keys of config.json", KEYS),
        ("Within `rope_parameters` or `rope_scaling`", ROPE_KEYS),
        ("Within `quantization_config`", QUANTIZATION_KEYS),
    )
    return HEAD + "".join(_table(title, rows) for title, rows in tables)


def _table(title: str, rows: Mapping[str, Row]) -> str:
    lines = [f"| `{key}` | {row.kind()} | {row.why} |" for key, row in rows.items()]
    return "\n".join(
        ["", f"## {title}", "", "| key | how | why, or what with |", "|---|---|---|", *lines, ""]
    )


if __name__ == "__main__":
    sys.exit(main())
