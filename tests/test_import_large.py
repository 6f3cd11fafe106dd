"""A capture larger than memory is imported in a few hundred MB.

DSATRACE_LARGE=1 imports one line of 1 GB instead of 128 MB.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from dsatrace.trace.reader import RunReader

LAYERS, TOP_K = 61, 512
LINE_BYTES = 1 << 30 if os.environ.get("DSATRACE_LARGE") else 128 << 20
MOST_MB = 400
DECODE_ROWS = 4

PEAK = """
import re, sys
from dsatrace import cli
code = cli.main(sys.argv[1:])
status = open("/proc/self/status").read()  # getrusage would count what the parent held
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", status)[1]) * 1024 / 1e6)
sys.exit(code)
"""


def write_line(path: Path) -> int:
    """One response of LINE_BYTES; returns its rows."""
    num_rows = LINE_BYTES * 3 // 4 // (4 * LAYERS * TOP_K)
    with path.open("wb") as file:
        file.write(b'{"text": "so", "meta_info": {"id": "long", "indexer_topk": "')
        rest = b""
        for t in range(num_rows):
            if t < TOP_K:
                row = np.concatenate([np.arange(t + 1), np.full(TOP_K - t - 1, -1)])
            else:
                row = np.arange(TOP_K) * t // TOP_K
            data = rest + np.tile(row.astype("<i4"), LAYERS).tobytes()
            whole = len(data) // 3 * 3
            file.write(base64.b64encode(data[:whole]))
            rest = data[whole:]
        tail = {"prompt_tokens": num_rows - DECODE_ROWS, "completion_tokens": DECODE_ROWS + 1}
        file.write(base64.b64encode(rest) + b'", ' + json.dumps(tail)[1:].encode() + b"}\n")
    return num_rows


def test_a_line_is_never_held_whole(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    num_rows = write_line(path)
    flags = ["--layers", str(LAYERS), "--top-k", str(TOP_K), "--ids", "position"]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, "import", path, "--format", "sglang", *flags, "--out", tmp_path / "run"],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    path.unlink()
    assert done.returncode == 0, done.stderr
    *said, peak_mb = done.stdout.splitlines()
    assert f"prompt rows: {num_rows - DECODE_ROWS:,}, positions" in said[1]
    (line,) = RunReader(tmp_path / "run").requests()
    assert (line["num_prompt_tokens"], line["num_output_tokens"]) == (num_rows - DECODE_ROWS, DECODE_ROWS + 1)
    assert float(peak_mb) < MOST_MB
