"""The README's commands run as printed, and the records table is the schema's.

Everything happens in a copy of the tree, in the active environment; the demo goes first, as
it does for a reader. Commands for the 671B weights run verbatim with the variables of the
tiny checkpoint.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from dsatrace.schema import records_markdown
from dsatrace.study.metrics import markdown_table

README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN_HERE = {
    "./scripts/test.sh": "it runs this very test",
    "./scripts/run_prefix_study.sh": "test_study_commands.py runs it, on less",
}
PARTIAL = shutil.ignore_patterns("*.egg-info", "*.pyc.*", "*.tmp.*")
"""Files that another process may be writing. Compiled code is copied: numba takes long to make it again."""
TINY = {
    "HF_CKPT": "data/models/needle-2k",
    "CKPT": "data/demo/mp2",
    "N_EXPERTS": "4",
    "MP": "2",
    "CONFIG": "data/models/needle-2k/serving_config.json",
}


def commands() -> list[str]:
    """Every command of the `sh` fences, in order, with continued lines joined."""
    fences = re.findall(r"^ *```sh\n(.*?)^ *```", README, flags=re.DOTALL | re.MULTILINE)
    lines = [line.strip() for fence in fences for line in fence.replace("\\\n", " ").splitlines()]
    return [re.sub(r" +", " ", line) for line in lines if line and not line.startswith("export ")]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of what the commands need."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("inference", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=PARTIAL)
    shutil.copytree(ROOT / "data" / "models", copy / "data" / "models")
    (copy / "outputs").mkdir()
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def test_the_commands_run_as_printed(checkout):
    found = commands()
    assert found[0] == "./scripts/demo.sh"
    assert "./scripts/test.sh" in found
    env = {
        **os.environ,
        "VENV": "none",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(checkout / "inference"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    for command in found:
        if command in NOT_RUN_HERE:
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=checkout,
            env=env | TINY if "$" in command else env,
            input="/exit\n",
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (checkout / "outputs" / "mine" / "report.png").stat().st_size > 10_000


def test_the_records_table_is_the_schemas():
    records = (ROOT / "docs" / "records.md").read_text(encoding="utf-8")
    _, _, rest = records.partition("<!-- records: python -m dsatrace.schema -->\n")
    table, end, _ = rest.partition("\n<!-- end of records -->")
    assert end
    assert table.strip() == records_markdown().strip()


def test_the_metrics_table_is_the_studys():
    page = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("<!-- metrics: python -m dsatrace.study.metrics -->\n")
    table, end, _ = rest.partition("\n<!-- end of metrics -->")
    assert end
    assert table.strip() == markdown_table().strip()


def test_every_trace_flag_is_in_the_reference():
    done = subprocess.run(
        [sys.executable, str(ROOT / "inference" / "generate.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    flags = set(re.findall(r"--(?:trace|kv)-[a-z-]+", done.stdout))
    assert len(flags) >= 10
    assert not {flag for flag in flags if f"`{flag}" not in README}


def test_requirements_are_those_of_the_package():
    listed = (ROOT / "inference" / "requirements.txt").read_text().splitlines()
    declared = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.M
    )
    assert declared is not None
    assert [line for line in listed if not line.startswith("#")] == re.findall(r'"(.+?)"', declared[1])
