"""The sanity script needs nothing but Python, and importing the package costs nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsatrace.schema import TABLES, problems

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("folder", "script"),
    [(".", "inference/sanity_trace_no_torch.py"), ("inference", "sanity_trace_no_torch.py")],
)
def test_runs_without_site_packages(folder: str, script: str, tmp_path: Path) -> None:
    command = [sys.executable, "-S", script, "--trace-out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, check=True)
    assert str(tmp_path / "run") in done.stdout
    assert "synthetic" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == set(TABLES)
    for name, fields in TABLES.items():
        text = (tmp_path / "run" / name).read_text()
        records = (
            [json.loads(line) for line in text.splitlines()] if name.endswith("l") else [json.loads(text)]
        )
        assert records
        assert [problems(record, "full", fields) for record in records] == [[]] * len(records)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert (manifest["state"], manifest["selections"]) == ("complete", "synthetic")
    again = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ")


def test_the_default_folder_is_under_outputs() -> None:
    command = [sys.executable, "-S", "inference/sanity_trace_no_torch.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    folder = Path(done.stdout.splitlines()[0].rsplit(": ", 1)[1])
    assert folder.parent == ROOT / "outputs"
    assert folder.name.startswith("sanity_no_torch_")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = """
import sys
import dsatrace, dsatrace.trace, dsatrace.schema, dsatrace.trace.config
heavy = {"torch", "numpy", "numba", "orjson", "pyarrow", "transformers"} & set(sys.modules)
assert not heavy, heavy
from dsatrace import PrefixCacheAnalyzer, TraceConfig, TraceWriter, Tracer
assert "torch" not in sys.modules
assert Tracer.__module__ == "dsatrace.trace.tracer"
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT / "inference", check=True)
