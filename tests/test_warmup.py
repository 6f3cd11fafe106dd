"""`dsatrace warmup` compiles kernels under the types that real data have: no run compiles them again."""

from __future__ import annotations

import json
import subprocess
import sys

from conftest import ROOT

SCRIPT = """
import json, pathlib, sys
import numpy as np
from dsatrace.captures.detector import Detector, _measure
from dsatrace.commands import warmup
from dsatrace.kv.policies.reuse import _count, reuse_profile
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.block_trace import BlockTrace
from dsatrace.trace.kind import engine_kind
from dsatrace.trace.load import load
from dsatrace.trace.selections import copy_runs

kernels = _measure, _count, copy_runs
signatures = lambda: [sorted(map(str, one.signatures)) for one in kernels]
told = [signatures()]
for job in (warmup._detector, warmup._lru_at_all_sizes, warmup._reader, warmup._locality):
    job()
told.append(signatures())
detector = Detector(engine_kind(2, 4))
for at in (0, 5):
    rows = np.sort(np.random.default_rng(at).integers(0, 5 + at, (5, 2, 4)), axis=2).astype(np.int32)
    detector.add("r", at, 3, rows)
trace = BlockTrace.from_tokens([[1, 2, 3, 4], [1, 2, 9, 9], [1, 2, 3, 4]], block_size=2)
reuse_profile(AccessStream.of_trace(trace, 2).head(0.5))
for _ in load(pathlib.Path(sys.argv[1])).all_selections():
    pass
told.append(signatures())
print(json.dumps(told))
"""


def test_real_data_compile_nothing_more() -> None:
    run = ROOT / "data" / "traces" / "needle-2k" / "2k"
    done = subprocess.run([sys.executable, "-c", SCRIPT, run], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    before, compiled, after = json.loads(done.stdout)
    assert before == [[], [], []]
    assert after == compiled
    assert [len(one) for one in compiled] == [1, 1, 2]  # ids as arrow gives them, and such as may be written
