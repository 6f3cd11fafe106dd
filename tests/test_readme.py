"""The commands of README and of the pages run as printed, and the generated tables are current.

Everything happens in a copy of the tree, in the active environment; the demo goes first, as
it does for a reader. What needs no shell runs in this process, the Python of the rest in forks of a warm
one. Commands for the 671B weights run verbatim with the variables of the tiny checkpoint.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT
from dsatrace.cli import main as dsatrace
from dsatrace.commands import generate, run_burstgpt
from dsatrace.schema import records_markdown
from dsatrace.study.metrics import markdown_table
from dsatrace.trace.reader import RunReader
from helpers.checkouts import copied_checkout, environment_in
from helpers.warm_python import warm_python
from test_run_scripts import SCRIPTS

DOCS = ROOT / "docs"
PAGES = ("tutorial", "datasets", "runs", "released-weights", "tiers", "replay-needle", "study")
WALKS = ("walk-capture", "walk-figure", "walk-budget")
"""Pages whose commands run here, in this order, behind README's; of walks what is Python, too."""
NOT_RUN_HERE = {
    "./scripts/test.sh": "it runs this very test",
    "./scripts/run_prefix_study.sh": "test_study_commands.py runs it, on less",
    **{f"./scripts/run_trace_{name}.sh": "test_run_scripts.py runs it" for name in SCRIPTS},
}
IN_THIS_PROCESS = {
    "dsatrace": dsatrace,
    "python3 inference/generate.py": generate.main,
    "python3 inference/run_burstgpt.py": run_burstgpt.main,
}
"""What needs no shell; a process of its own would load torch and the kernels once more."""
TINY = {
    "HF_CKPT": "data/models/needle-2k",
    "CKPT": "data/demo/mp2",
    "N_EXPERTS": "4",
    "MP": "2",
    "CONFIG": "data/models/needle-2k/serving_config.json",
}


def fences(page: Path, languages: str) -> list[tuple[str, str]]:
    """Language and text of a page's fences in one of the `languages`, such as `sh|python`."""
    found = re.findall(
        rf"^ *```({languages})\n(.*?)^ *```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    return [(str(language), str(text)) for language, text in found]


def commands(text: str) -> list[str]:
    """The commands of a fence, with continued lines joined."""
    lines = [line.strip() for line in text.replace("\\\n", " ").splitlines()]
    return [re.sub(r" +", " ", line) for line in lines if line and not line.startswith("export ")]


def steps() -> list[str]:
    """What README and the pages do, in order; of equal commands the first. What has line breaks is Python."""
    pages = [ROOT / "README.md", *(DOCS / f"{name}.md" for name in PAGES)]
    found = [command for page in pages for _, text in fences(page, "sh") for command in commands(text)]
    for name in WALKS:
        for language, text in fences(DOCS / f"{name}.md", "sh|python"):
            found += [text] if language == "python" else commands(text)
    return list(dict.fromkeys(found))


def call(command: str) -> Callable[[], int] | None:
    """How to run it in this process; None where it takes a shell, or somebody who types."""
    if "\n" in command:
        return lambda: exec(command, {}) or 0
    if "--interactive" in command or set("$()|<>;") & set(command):
        return None
    for start, main in IN_THIS_PROCESS.items():
        if command.startswith(f"{start} "):
            return lambda: main(shlex.split(command.removeprefix(start)))
    return None


def test_the_commands_run_as_printed(tmp_path, monkeypatch, capfd):
    found = steps()
    assert found[0] == "./scripts/demo.sh"
    assert set(NOT_RUN_HERE) <= set(found)
    checkout = copied_checkout(tmp_path / "checkout")
    monkeypatch.chdir(checkout)
    num_in_this_process = 0
    said = "How many ships?\n/exit\n"  # under torchrun, too, where rank 0 reads it and the others follow
    with warm_python() as path:
        env = environment_in(checkout) | {"PATH": path}
        for command in found:
            if command in NOT_RUN_HERE:
                continue
            if here := call(command):
                num_in_this_process += 1
                assert here() == 0, (command, capfd.readouterr())
                continue
            done = subprocess.run(
                ["bash", "-c", command],
                env=env | TINY if "$" in command else env,
                input=said,
                capture_output=True,
                text=True,
                timeout=600,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert 10 < num_in_this_process < len(found) - 10
    assert (checkout / "outputs" / "mine" / "report.png").stat().st_size > 10_000
    for name in ("rows", "blocks"):  # the flags of a script reach the runner
        run = RunReader(checkout / "outputs" / name)
        assert run.manifest["tiers"]["granularity"] == name.removesuffix("s")
        assert run.summary()["tiers"]["local_pool"]["hit_units"] > 0


def test_the_records_table_is_the_schemas():
    records = (DOCS / "records.md").read_text(encoding="utf-8")
    _, _, rest = records.partition("<!-- records: python -m dsatrace.schema -->\n")
    table, end, _ = rest.partition("\n<!-- end of records -->")
    assert end
    assert table.strip() == records_markdown().strip()


def test_the_metrics_table_is_the_studys():
    page = (DOCS / "study.md").read_text(encoding="utf-8")
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
    page = (DOCS / "runs.md").read_text(encoding="utf-8")
    assert not {flag for flag in flags if f"`{flag}" not in page}


def test_requirements_are_those_of_the_package():
    listed = (ROOT / "inference" / "requirements.txt").read_text().splitlines()
    declared = re.search(
        r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL | re.M
    )
    assert declared is not None
    assert [line for line in listed if not line.startswith("#")] == re.findall(r'"(.+?)"', declared[1])
