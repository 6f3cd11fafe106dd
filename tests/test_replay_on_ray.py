"""`--engine ray`: what processes find, found by the workers of a cluster of two nodes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import INFERENCE
from dsatrace.commands.replay import main
from dsatrace.errors import UserError
from dsatrace.selection_replay import on_ray
from dsatrace.selection_replay.on_ray import call_on_ray
from helpers.command_runs import told_error
from helpers.golden_run import GoldenRequest, write_golden

REQUESTS = [GoldenRequest(f"r{i}", 30 + 5 * i, 9 + i % 3) for i in range(6)]


def test_ray_may_be_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    out = tmp_path / "out"
    said = told_error(capsys, lambda: main([str(tmp_path), "--engine", "ray", "--out", str(out)]))
    assert "ray is not installed; pip install 'dsatrace[ray]'" in said
    assert not out.exists()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two nodes of one CPU each, on this machine; their workers can import what the tests call."""
    pytest.importorskip("ray", reason="needs ray: pip install 'dsatrace[ray]'")
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(INFERENCE), str(Path(__file__).parent)]))
        started = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        started.add_node(num_cpus=1)
        started.wait_for_nodes()
        patch.setenv("RAY_ADDRESS", started.address)
        yield started
        started.shutdown()


def where_it_runs(_: int) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def refuse(number: int) -> int:
    if number == 3:
        raise UserError("3: is no number to use")
    return number


def divide(number: int) -> float:
    return 1 / number


def end_once(marker: str) -> str:
    """The worker is lost the first time."""
    if not Path(marker).exists():
        Path(marker).touch()
        os._exit(1)
    return "done"


def test_both_nodes_replay(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = str(write_golden(tmp_path / "run", REQUESTS, sealed=True))
    monkeypatch.setattr("dsatrace.trace.selection_parts.MIN_PART_BYTES", 1)
    flags = ("--policy", "lru,opt", "--no-figure")
    assert main([run, *flags, "--out", str(tmp_path / "here")]) == 0
    assert main([run, *flags, "--out", str(tmp_path / "there"), "--engine", "ray"]) == 0
    here, there = (json.loads((tmp_path / name / "replay.json").read_bytes()) for name in ("here", "there"))
    assert there == here
    kept = [{file.name for file in (tmp_path / name / "parts").iterdir()} for name in ("here", "there")]
    assert len(kept[0]) == len(REQUESTS) and kept[0] == kept[1]


def test_calls_go_to_both_nodes(cluster: Any) -> None:
    assert len({node for _, node in call_on_ray(where_it_runs, range(40))}) == 2


def test_a_lost_worker_is_replaced(cluster: Any, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    assert list(call_on_ray(end_once, [str(marker)])) == [(0, "done")]
    assert marker.exists()


def test_a_mistake_is_told_as_in_a_process(cluster: Any) -> None:
    with pytest.raises(UserError, match=r"^3: is no number to use$"):
        list(call_on_ray(refuse, range(5)))


def test_another_fault_is_named(cluster: Any) -> None:
    with pytest.raises(UserError, match=r"a worker failed: ZeroDivisionError: division by zero;"):
        list(call_on_ray(divide, [1, 0]))


def test_few_calls_wait_at_a_time(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a cluster gets a list of any length."""
    monkeypatch.setattr(on_ray, "WAITING_PER_CPU", 1)
    handed_over = []

    def arguments() -> Iterator[int]:
        for number in range(1, 9):
            handed_over.append(number)
            yield number

    results = call_on_ray(divide, arguments())
    next(results)
    assert len(handed_over) <= 2
    assert len(list(results)) == 7
