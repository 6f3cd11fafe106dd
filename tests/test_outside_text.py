"""Text that others wrote: through every verb that shows it, no control reaches the terminal or a picture."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import INFERENCE
from dsatrace import cli
from dsatrace.report.drawing import picture, plain_label
from dsatrace.report.grid import Grid, show
from dsatrace.text import MAX_CHARS, for_file_name, for_picture, plain, plain_lines
from helpers.golden_run import REQUESTS, SERVING, write_golden

ESC, CSI, OVERRIDE = "\x1b", "\x9b", "\N{RIGHT-TO-LEFT OVERRIDE}"
NAMES = {
    "escape": f"{ESC}[2J{ESC}]0;owned\x07name",
    "c1": f"{CSI}31mname\x7f",
    "closing tag": "[/nope]",
    "bold": "[bold]name[/bold]",
    "lines": "one\ntwo\r\rthree",
    "formula": "$x^",
    "formulas": "$\\frac{$ and $x_{$",
    "path": "../../x",
    "long": "n" * (MAX_CHARS + 1_000),
    "override": f"{OVERRIDE}eman",
}
HALF = "\ud800"


def is_harmless(text: str) -> bool:
    """No control but line breaks, no mark that turns the text, nothing that UTF-8 cannot hold."""
    return not [c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"]


def told(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Exit code and everything said, which is harmless, of a command."""
    capsys.readouterr()
    try:
        code = cli.main([str(argument) for argument in argv])
    except SystemExit as ended:  # argparse's own
        code = int(ended.code or 0)
    said = "".join(capsys.readouterr())
    assert is_harmless(said), [c for c in said if not is_harmless(c)]
    assert "Traceback" not in said
    return code, said


@given(st.text(st.characters() | st.sampled_from(f"{ESC}{CSI}{HALF}\n")))
def test_plain_is_one_harmless_line(text: str) -> None:
    shown = plain(text)
    assert is_harmless(shown.replace("\u200c", "").replace("\u200d", "")) and "\n" not in shown
    shown.encode()
    assert plain(shown) == shown
    if text.isprintable():
        assert shown == text
    assert plain_lines("a\n\tb") == "a\n\tb"


def test_plain_says_what_stood_there() -> None:
    assert plain(f"{ESC}[31m\n{HALF}{OVERRIDE}\x7f") == r"\u001b[31m\n\ud800\u202e\u007f"
    assert plain("Grüße, 缓存 \N{NO-BREAK SPACE}") == "Grüße, 缓存  "
    assert plain("x" * (MAX_CHARS + 1)) == "x" * MAX_CHARS + f"… ({MAX_CHARS + 1:,} characters)"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_file_name_stays_in_its_folder(name: str) -> None:
    assert re.fullmatch("[A-Za-z0-9_-]{0,60}", for_file_name(name))


@pytest.mark.parametrize("name", [*NAMES.values(), HALF], ids=[*NAMES, "half"])
def test_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    grid = Grid(name, ("", name), [(name, name)], note=name)
    show([grid, name])
    print(grid.markdown())
    said = capsys.readouterr().out
    assert is_harmless(said)
    assert ("[/nope]" in said) is (name == "[/nope]")
    with picture(tmp_path / "p.png", (4, 3), without="--no-figure") as (figure, (axes,)):
        axes.plot([1], label=plain_label(name))
        axes.legend()
        axes.set_title(for_picture(name))
        figure.canvas.draw()
        assert axes.title.get_text().replace(r"\$", "$") == plain(name, 80)
    assert (tmp_path / "p.png").stat().st_size > 1000


KINDS = {
    "controls": "".join(NAMES[kind] for kind in ("escape", "c1", "lines", "override", "bold")),
    "markup": NAMES["closing tag"],
    "formula": NAMES["formula"],
    "long path": NAMES["path"] + NAMES["long"],
}


@pytest.fixture(scope="module", params=KINDS)
def hostile(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run whose folder, request ids, labels and own JSON bear the name."""
    name = KINDS[request.param]
    folder = tmp_path_factory.mktemp("hostile") / (name.replace("/", "_")[:80] or "run")
    renamed = (one._replace(request_id=f"{name}{one.request_id}") for one in REQUESTS[1:])
    write_golden(folder, [REQUESTS[0], *renamed], serving=SERVING)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"workload": {"name": name, name: {name: 3}}, "tracing_cost": None}
    summary["scores"]["by"] = {name: {name: {"mean": 1.0, "num_scored": 1}}}
    summary["serving"]["clock"] = name
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder, name


def test_report_text_and_picture(hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = hostile
    code, said = told(capsys, "report", folder)
    assert code == 0 and "KV blocks touched" in said
    assert (folder / "report.png").stat().st_size > 10_000


def test_summarize_is_json_still(hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    folder, name = hostile
    code, said = told(capsys, "summarize", folder)
    assert code == 0
    assert f"{name}r2" in json.loads(said[said.index("{") :])["prefix_hot_blocks"]


def test_verify_names_the_mismatch(
    hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = shutil.copytree(hostile[0], tmp_path / hostile[0].name)
    steps = folder / "trace_steps.jsonl"
    lines = steps.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"unique_blocks": 10_000})
    steps.write_text("\n".join(lines) + "\n")
    code, said = told(capsys, "verify", folder, "--jobs", 1)
    assert code == 1 and said.count("\n") == 1 and said.startswith("bad: ")


def test_export_there_and_back(
    hostile: tuple[Path, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder, _ = hostile
    assert told(capsys, "export", folder, "--to", "parquet", "--out", tmp_path / "p")[0] == 0
    assert told(capsys, "export", tmp_path / "p", "--to", "jsonl", "--out", tmp_path / "j")[0] == 0
    assert (tmp_path / "j" / "trace_steps.jsonl").read_bytes() == (folder / "trace_steps.jsonl").read_bytes()


def hostile_row(data_set: str, name: str) -> dict[str, Any]:
    """A row that bears the name wherever there is room for text."""
    if data_set == "ruler":
        return {"index": 0, "input": f"{name} Which ship?", "outputs": [name], "length": 9, name: name}
    if data_set == "sharegpt":
        turns = [("human", f"{name} Which ship?"), ("gpt", name)]
        return {"id": name, "conversations": [{"from": role, "value": text} for role, text in turns]}
    texts = ("_id", "domain", "sub_domain", "question", "context", *(f"choice_{c}" for c in "ABCD"))
    return {"answer": "A", "difficulty": "easy", "length": "short", **dict.fromkeys(texts, name)}


FLAGS = {
    "ruler": ("--ruler-task", "vt", "--ruler-path"),
    "longbenchv2": ("--longbenchv2-json",),
    "sharegpt": ("--sharegpt-json",),
    "burstgpt": ("--burstgpt-csv",),
}


@pytest.mark.parametrize("data_set", FLAGS)
def test_hostile_rows(data_set: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that can be served bear every name; a bad one after them quotes one in its error."""
    file = tmp_path / f"rows{ESC}[31m.jsonl"
    if data_set == "burstgpt":
        with file.open("w", newline="") as text:
            rows = csv.writer(text)
            rows.writerow(("Timestamp", "Session ID", "Model", "Request tokens", "Response tokens"))
            names = [re.sub(r"[\r\n]", " ", name) for name in NAMES.values()]
            rows.writerows((0, name, name, 4, 2) for name in names)
            rows.writerow((0, "", "", f"{ESC}[2J", 2))
    else:
        good = [hostile_row(data_set, name) for name in NAMES.values()]
        bad = {"conversations": [{"from": f"{ESC}[2J", "value": "x"}], f"{ESC}[2J": 1}
        file.write_text("".join(json.dumps(row) + "\n" for row in (*good, bad)))
    command = ("run", data_set, "--runner", "simulator", *FLAGS[data_set], file, "--trace-out")
    code, said = told(capsys, *command, tmp_path / "fail")
    assert code == 2 and said.count("error: ") == 1
    code, said = told(capsys, *command, tmp_path / "skip", "--bad-rows", "skip")
    assert code == 0, said
    assert f"{len(NAMES)} requests (" in said, said
    assert told(capsys, "report", tmp_path / "skip", "--no-figure")[0] == 0


@pytest.mark.parametrize("name", [n for n in NAMES.values() if len(n) < 100 and "/" not in n])
def test_a_hostile_archive_member(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive = tmp_path / "rows.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        link = tarfile.TarInfo(f"data/{name}")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    run = ("run", "ruler", "--runner", "simulator", "--ruler-path", archive, "--trace-out", tmp_path / "out")
    code, said = told(capsys, *run)
    assert code == 2 and "is a link" in said


def test_the_studies_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "prompt": "the same words again " * 12,
            "response": "yes",
            "conversation_id": f"{name}{i}",
            "turn_index": 0,
            "timestamp": i,
            "mode": "multi_turn",
            "workload": name,
        }
        for i, name in enumerate([*NAMES.values(), *NAMES.values()])
    ]
    trace = tmp_path / f"trace{ESC}[31m.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    verbs: dict[str, tuple[object, ...]] = {
        "run": ("--skip-visualization",),
        "explain": (),
        "mixed": ("--policies", "lru", "--num-blocks", 8, "--skip-visualization"),
        "sweep": ("--policies", "lru", "--capacities", 8, "--block-sizes", 4, "--workers", 1),
    }
    for verb, flags in verbs.items():
        out = tmp_path / verb
        code, said = told(capsys, "study", verb, "--trace-file", trace, *flags, "--output-dir", out)
        assert code == 0, said
        assert "[/nope]" in said or verb in ("explain", "mixed")
        assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", path.name) for path in out.iterdir())
        again, shown = told(capsys, "report", out)
        assert again == 0
        assert "[/nope]" in shown or verb in ("explain", "mixed")  # mixed folds its columns


EACH = """
import sys
from dsatrace import cli
for command in sys.argv[1].split(" ; "):
    try:
        code = cli.main(command.split())
    except SystemExit as exit:
        code = exit.code
    print("", f"exit {code}", sep="\\n", end="\\n", flush=True)
"""
"""One process for many commands: each of its own would load numba and matplotlib once more."""


def test_a_name_that_is_no_text_at_all(tmp_path: Path) -> None:
    """Folders whose names are not UTF-8, in a process that may write nothing else."""
    folder = tmp_path / b"\xff\x1b[31m".decode("utf-8", "surrogateescape")
    env = {"PYTHONPATH": str(INFERENCE), "PATH": "/usr/bin:/bin", "PYTHONIOENCODING": "utf-8:strict"}
    study = folder / "study"
    commands = (
        ("run", "sharegpt", "--runner", "simulator", "--no-hub", "--limit", "1", "--trace-out", folder),
        ("study", "explain", "--output-dir", study),
        ("report", folder),
        ("verify", folder),
        ("summarize", folder),
        ("report", study),
        ("report", folder / "gone"),
    )
    argv = " ; ".join(" ".join(map(str, command)) for command in commands)
    done = subprocess.run(
        [sys.executable, "-c", EACH, argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=env,
        check=False,
    )
    said = done.stdout
    assert b"\x1b" not in said and b"\xff" not in said and b"Traceback" not in said, said
    assert re.findall(rb"\nexit (\d+)\n", said) == [b"0"] * 6 + [b"2"], said
    assert said.rpartition(b"exit 0\n")[2].startswith(b"error: ")
