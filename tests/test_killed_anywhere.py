"""Runs killed with SIGKILL at random moments and resumed, again and again, end as an undisturbed one does.

Plain, with KV in tiers, and of two ranks, one request at a time, so that scores must be equal too. A few for
CI; by hand, with a table:

    DSATRACE_KILLS=200 python -m pytest -s tests/test_killed_anywhere.py
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsatrace import files
from dsatrace.commands.verify import verify_run
from dsatrace.model.config import ModelArgs
from dsatrace.model.convert import convert_checkpoint
from dsatrace.schema import MANIFEST_FILE, STEPS_FILE
from dsatrace.trace.reader import RunReader
from dsatrace.verify.run import verify
from helpers.checkpoints import tiny_config
from helpers.forked import call, run_command, start
from helpers.resume_samples import answers_of, check_summary, records_of
from helpers.stores import free_port
from test_damaged_inputs import ended

NUM_KILLS = int(os.environ.get("DSATRACE_KILLS", "3"))
SEED = int(os.environ.get("DSATRACE_KILLS_SEED", "0"))
LONGEST_S = 120
PROMPTS = (20, 45, 12, 60, 33, 25)
"""Words of each."""
RUN = ("--dataset", "sharegpt", "--no-hub", "--device", "cpu", "--max-new-tokens", 6, "--max-batch-size", 1)
RUN = (*RUN, "--max-seq-len", 512, "--cache-block-size", 16, "--trace-prefill", "last")


Record = dict[str, Any]


class Kind(NamedTuple):
    """A way to run, its share of the kills, and the fields of a record that depend on what ran before."""

    share: float
    flags: tuple[object, ...] = ()
    num_ranks: int = 1
    may_differ: tuple[str, ...] = ()


ROWS = ("--hbm-blocks", 3, "--granularity", "row", "--local-pool", "ram")
KINDS = {
    "plain": Kind(0.45),
    # A read takes rows that lie side by side; where they lie depends on the rows that were freed before.
    "offloaded": Kind(0.35, ROWS, may_differ=("local_pool.read_ops", "hbm.read_ops")),
    "two ranks": Kind(0.2, num_ranks=2),
}


class Runs:
    """Starts one kind of run, whole or to be killed."""

    def __init__(self, kind: Kind, flags: Sequence[object], folder: Path) -> None:
        self.flags = (*RUN, *kind.flags, *flags)
        self.num_ranks = kind.num_ranks
        self.said = folder / "said.txt"

    def start(self, *flags: object) -> list[BaseProcess]:
        self.said.write_text("")
        if self.num_ranks == 1:
            return [start(flags, self.said)]
        group = {
            "WORLD_SIZE": str(self.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(self.num_ranks)]
        return [start(flags, self.said, rank) for rank in ranks]

    def finish(self, folder: Path, *flags: object) -> tuple[float, float]:
        """Runs to the end; returns the seconds until its manifest stood there, and all seconds."""
        processes, begin, manifest_s = self.start(*flags), time.monotonic(), 0.0
        while processes[0].is_alive() and not (folder / MANIFEST_FILE).exists():
            manifest_s = time.monotonic() - begin
            processes[0].join(0.01)
        for process in processes:
            process.join(LONGEST_S)
            assert process.exitcode == 0, self.said.read_text()
        return manifest_s, time.monotonic() - begin

    def kill(self, after_s: float, *flags: object) -> bool:
        """Whether the run, or one of its ranks, was still going after so many seconds, when it was killed."""
        processes = self.start(*flags)
        processes[0].join(after_s)
        for process in processes:
            process.kill()
        for process in processes:
            process.join(LONGEST_S)
        codes = {process.exitcode for process in processes}
        assert codes <= {0, -9}, (codes, self.said.read_text())
        assert "Traceback" not in self.said.read_text()
        return codes == {-9}


def stage(folder: Path) -> str:
    """How far a killed run had come."""
    if not (folder / MANIFEST_FILE).exists():
        return "before its manifest"
    manifest = json.loads((folder / MANIFEST_FILE).read_bytes())
    if manifest["state"] == "complete":
        return "complete already"
    steps = folder / STEPS_FILE
    return "recording" if steps.exists() and steps.stat().st_size else "before its first record"


def check_killed(folder: Path) -> None:
    """A killed run is right as far as it came; one without a record is of no use."""
    code, said = ended(partial(verify_run, folder))
    if next(RunReader(folder).steps(), None) is None:
        assert (code, said.count("\n")) == (1, 1), said
        assert "it should have records and has none" in said
    else:
        assert (code, said) == (0, "")
    state = "complete" if stage(folder) == "complete already" else "incomplete"
    assert RunReader(folder).state == verify(folder).state == state


def differences(records: Mapping[Any, Record], expected: Mapping[Any, Record]) -> Counter[str]:
    """Counts the fields that differ, by name."""
    assert records.keys() == expected.keys()
    found: Counter[str] = Counter()
    for key, record in expected.items():
        was, now = flat(record), flat(records[key])
        assert was.keys() == now.keys()
        found.update(name for name in was if was[name] != now[name])
    return found


def flat(record: Record) -> Record:
    """Without latencies, which are measured; the fields of each tier by their own names."""
    tiers = record["kv_fetch"]
    fields = {f"{tier}.{name}": value for tier in tiers for name, value in tiers[tier].items()}
    fields |= {name: value for name, value in record.items() if name != "kv_fetch"}
    return {name: value for name, value in fields.items() if not name.endswith(".latency_us")}


@pytest.fixture(scope="module")
def model(tiny_hf: Path, tiny_args: ModelArgs, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The checkpoint by ranks, beside the config and the chats."""
    folder = tmp_path_factory.mktemp("killed")
    tiny_config(folder, index_topk=16)
    draw = random.Random(0)
    asked = [" ".join(draw.choices(("ship", "port", "fog", "41"), k=words)) for words in PROMPTS]
    talks = [({"from": "human", "value": text}, {"from": "gpt", "value": "Yes."}) for text in asked]
    chats = [{"id": f"c{i}", "conversations": talk} for i, talk in enumerate(talks)]
    (folder / "chats.json").write_text(json.dumps(chats))
    for ranks in (1, 2):
        convert_checkpoint(tiny_hf, folder / str(ranks), tiny_args.n_routed_experts, model_parallel=ranks)
    return {ranks: folder / str(ranks) for ranks in (1, 2)}


@pytest.mark.parametrize("name", KINDS)
def test_killed_at_any_moment(name: str, model: dict[int, Path], tmp_path: Path) -> None:
    kind, draw = KINDS[name], random.Random(f"{SEED} {name}")
    checkpoint = model[kind.num_ranks]
    shared = ("--ckpt-path", checkpoint, "--config", checkpoint.parent / "config.json")
    runs = Runs(kind, (*shared, "--sharegpt-json", checkpoint.parent / "chats.json"), tmp_path)
    whole = tmp_path / "whole"
    manifest_s, duration_s = runs.finish(whole, *runs.flags, "--trace-out", whole)
    expected, answers = records_of(whole), answers_of(whole)
    sound, tiers = verify(whole), RunReader(whole).summary()["tiers"]
    check_killed(whole)  # as one that was killed between its last write and its exit
    assert (tiers is not None and tiers["local_pool"]["bytes_moved"] > 0) == (name == "offloaded")
    counts: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    stages: Counter[str] = Counter()
    wanted, begin = max(1, round(NUM_KILLS * kind.share)), time.monotonic()
    while counts["kills"] < wanted:
        folder, flags = tmp_path / "run", (*runs.flags, "--trace-out", tmp_path / "run")
        num_kills = draw.choice((1, 1, 2, 3))
        while num_kills and counts["kills"] < wanted:
            if not runs.kill(draw.uniform(0.9 * manifest_s, duration_s), *flags):
                counts["too late"] += 1
                break
            stages[stage(folder)] += 1
            if (folder / MANIFEST_FILE).exists():  # else there is nothing to resume yet
                num_kills -= 1
                counts["kills"] += 1
                counts["of a resume"] += "--resume" in flags
                check_killed(folder)
                flags = ("--resume", folder)
                if stage(folder) == "complete already":
                    break
        if "--resume" not in flags:
            shutil.rmtree(folder)
            continue
        if stage(folder) != "complete already":
            runs.finish(folder, *flags)
        verified = verify(folder)
        assert (verified.state, verified.notes, verified.faults) == ("complete", sound.notes, ())
        differing += differences(records_of(folder), expected)
        assert answers_of(folder) == answers
        check_summary(folder)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        counts["runs"] += 1
        counts["records"] += len(expected)
        shutil.rmtree(folder)
    print(f"\n{name}: {dict(counts)}, killed {dict(stages)}, values that differ {dict(differing)}")
    print(f"{duration_s:.2f} s a run, {manifest_s:.2f} to its manifest; {time.monotonic() - begin:.0f} s")
    assert differing.keys() <= set(kind.may_differ)


def run_until(killed_at: str, argv: list[str], said: Path) -> None:
    """A run that kills itself before it writes its manifest, or before it renames it."""

    def kill(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(*{"write": (files, "write_all"), "rename": (Path, "replace")}[killed_at], kill)
    run_command("run_dataset", argv, (Path(os.devnull), said, said), {})


def test_killed_before_its_manifest(model: dict[int, Path], tmp_path: Path) -> None:
    """What such a run leaves does not keep the next start out of its folder."""
    shared = ("--ckpt-path", model[1], "--config", model[1].parent / "config.json")
    runs = Runs(KINDS["plain"], (*shared, "--sharegpt-json", model[1].parent / "chats.json"), tmp_path)
    folder, lengths = tmp_path / "run", []
    argv = [*runs.flags, "--limit", 1, "--trace-out", folder]
    for killed_at in ("write", "rename"):
        process = call(run_until, killed_at, list(map(str, argv)), runs.said)
        process.join(LONGEST_S)
        assert process.exitcode == -signal.SIGKILL, runs.said.read_text()
        (left,) = folder.iterdir()
        assert left.name == ".manifest.json.tmp"
        lengths.append(left.stat().st_size)
    assert lengths[0] == 0 < lengths[1]
    runs.finish(folder, *argv)
    assert (verify(folder).state, verify(folder).faults) == ("complete", ())
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
