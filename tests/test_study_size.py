"""`study size`: its curve is simulation's, its recommendation is the curve's, and a mistake is one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsatrace import cli
from dsatrace.commands.study.options import spread_over
from dsatrace.kv.policies.simulate import simulate
from dsatrace.kv.policies.stream import AccessStream
from dsatrace.kv.simulation.replay import ReplayConfig, replay
from dsatrace.study.requests import RequestsBuilder, StudyRequests, block_trace
from dsatrace.study.size import (
    SizeCurve,
    default_sizes,
    recommendation,
    replica_traces,
    settings_of,
    size_cells,
)
from dsatrace.units import size_text
from helpers.command_runs import told_error
from helpers.page import Page
from helpers.study_samples import check_mistake, requests_of, study, study_json

BLOCK, BLOCK_BYTES = 4, 4 * 1000
FLAGS = ("size", "--workloads", "chat_multi", "--num-requests", 40, "--seeds", 2, "--kv-layout", "glm-5")
FLAGS += ("--tokenizer", "words", "--turn-delay", 1)


def chats(num_chats: int, turns: int) -> StudyRequests:
    """Conversations that take turns; all begin alike, and every turn adds tokens of its own."""
    builder, fresh = RequestsBuilder(), iter(range(100, 10**6))
    histories = [[1, 2, 3, 4] for _ in range(num_chats)]
    for turn in range(turns):
        for chat, history in enumerate(histories):
            history.extend(next(fresh) for _ in range(5 + chat))
            answer = [next(fresh) for _ in range(3)]
            time_s = float(turn * num_chats + chat)
            builder.add(time_s, list(history), answer, conversation=(str(chat),), turn=turn)
            history.extend(answer)
    return builder.build()


def curve_of(requests: StudyRequests, sizes: list[int] | None = None, **how: Any) -> SizeCurve:
    traces = replica_traces(requests, BLOCK, how.get("replicas", 1), how.get("routing", "round-robin"))
    sizes = sizes or default_sizes(traces, BLOCK_BYTES)
    cells = size_cells(traces, settings_of(sizes, BLOCK_BYTES, by_conversation=True))
    return SizeCurve.of(BLOCK_BYTES, sizes, [cells], "conversations")


def test_the_curves_are_those_of_simulation_and_of_the_pool() -> None:
    requests = chats(6, 5)
    trace = block_trace(requests, BLOCK)
    stream, prompt_blocks = AccessStream.of_trace(trace), trace.prompt_blocks
    curve = curve_of(requests)
    assert len(curve.sizes) > 5
    assert curve.sizes[-1] >= trace.num_keys * BLOCK_BYTES > curve.sizes[-2]
    for i, size in enumerate(curve.sizes):
        capacity = size // BLOCK_BYTES
        fits = trace.needed_blocks <= capacity
        for name in ("lru", "opt"):
            hits = simulate(stream.select(fits), name, capacity, leaf=True).hits
            assert curve.rates[name][i].hits == int(np.minimum(hits, prompt_blocks[fits]).sum())
        pool = replay(trace, ReplayConfig(capacity))
        assert curve.rates["vllm"][i].hits == int(pool.hit_tokens.sum()) // BLOCK
        assert curve.rates["vllm"][i].accesses == int(prompt_blocks.sum())
    assert curve.unlimited.hits == int(replay(trace, ReplayConfig(None)).hit_tokens.sum()) // BLOCK > 0
    rates = [cell.hit_rate for cell in curve.rates["vllm"]]
    assert rates[0] < rates[-1]


@pytest.mark.parametrize("target", [0.3, 0.9, 1.0])
def test_the_recommendation_is_the_least_size_of_the_curve_that_serves_the_share(target: float) -> None:
    curve = curve_of(chats(6, 5))
    advice = recommendation(curve, target)
    rates = [cell.hit_rate for cell in curve.rates["vllm"]]
    at = curve.sizes.index(advice.bytes_per_device)
    assert advice.is_reached
    assert advice.hit_rate == rates[at] >= target * curve.unlimited.hit_rate
    assert all(rate < target * curve.unlimited.hit_rate for rate in rates[:at])
    assert advice.opt_hit_rate == curve.rates["opt"][at].hit_rate
    assert f"{100 * rates[at] / curve.unlimited.hit_rate:.1f} % of what any size could" in advice.text("")
    if at + 1 < len(rates):
        assert (advice.next_bytes, advice.next_hit_rate) == (2 * curve.sizes[at], rates[at + 1])
        assert f"Doubling adds {100 * (rates[at + 1] - rates[at]):.1f} points" in advice.text("")


def test_a_recommendation_says_where_no_size_serves_enough_and_where_nothing_repeats() -> None:
    small = recommendation(curve_of(chats(6, 5), [3 * BLOCK_BYTES, 4 * BLOCK_BYTES]), 0.9)
    assert not small.is_reached
    assert small.next_bytes is None
    assert "(95 %: " in small.text("")
    assert small.text("").startswith("No size here serves 90 % of what any size could")
    builder = RequestsBuilder()
    for at in range(3):
        builder.add(float(at), range(100 * at, 100 * at + 9), [])
    nothing = recommendation(curve_of(builder.build()), 0.9)
    assert nothing.text("").startswith("No cache of any size hits")


def test_a_single_conversation_has_no_interval_and_the_recommendation_says_so() -> None:
    advice = recommendation(curve_of(chats(1, 6)), 0.9)
    assert (advice.hit_rate_low, advice.hit_rate_high) == (None, None)
    assert "(one set of requests, no interval)" in advice.text("")


def test_replicas_share_nothing_and_prefix_affine_keeps_conversations_together() -> None:
    requests = chats(5, 6)
    whole = block_trace(requests, BLOCK)
    traces = replica_traces(requests, BLOCK, 2, "round-robin")
    assert [trace.num_requests for trace in traces] == [15, 15]
    curves = {way: curve_of(requests, replicas=2, routing=way) for way in ("round-robin", "prefix-affine")}
    for way, curve in curves.items():
        parts = replica_traces(requests, BLOCK, 2, way)
        alone = [int(replay(part, ReplayConfig(None)).hit_tokens.sum()) // BLOCK for part in parts]
        assert curve.unlimited.hits == sum(alone)
        assert curve.unlimited.accesses == int(whole.prompt_blocks.sum())
    affine, spread = (curves[way].unlimited.hits for way in ("prefix-affine", "round-robin"))
    assert spread < affine <= curve_of(requests).unlimited.hits
    parts = replica_traces(requests, BLOCK, 2, "prefix-affine")
    chats_of = [set(part.conversation.tolist()) for part in parts]
    assert chats_of[0] and chats_of[1] and not chats_of[0] & chats_of[1]


def test_prefix_affine_leaves_no_replica_idle_where_all_prompts_begin_alike() -> None:
    """One long system prompt: whoever has it first would get every request."""
    builder, system = RequestsBuilder(), range(40)
    for at in range(60):
        builder.add(float(at), [*system, *range(100 * at + 100, 100 * at + 110)], [])
    traces = replica_traces(builder.build(), BLOCK, 4, "prefix-affine")
    given = [int(trace.total_tokens.sum()) for trace in traces]
    assert max(given) <= 1.5 * 60 * 50 / 4 + 50
    assert min(given) > 0


def test_a_seed_is_one_part_however_many_replicas_serve_it() -> None:
    traces = replica_traces(chats(5, 6), BLOCK, 3, "round-robin")
    for cell in size_cells(traces, settings_of([40 * BLOCK_BYTES], BLOCK_BYTES)):
        assert cell.parts.tolist() == [[cell.hits, cell.accesses]]
        assert cell.requests == 30


def test_the_command_writes_what_it_prints(tmp_path: Path, capsys: Any) -> None:
    assert study(*FLAGS, "--output-dir", tmp_path / "out") == 0
    printed = " ".join(capsys.readouterr().out.split())
    record = json.loads((tmp_path / "out" / "size.json").read_text())
    advice = record["recommendation"]
    assert f"recommendation: {advice['text']}" in printed
    assert "A token is a word here" in advice["text"] and "may leave blocks out" in printed
    assert "over 2 seeds" in printed and "61,464 bytes per token and device" in printed
    assert record["block_bytes"] == 64 * 61_464
    for row in record["curve"][:-1]:
        assert row["capacity_blocks"] == row["bytes_per_device"] // record["block_bytes"]
        assert row["hit_rate_low"] <= row["hit_rate"] <= row["hit_rate_high"]
    (chosen,) = (
        row
        for row in record["curve"]
        if (row["policy"], row["bytes_per_device"]) == ("vllm", advice["bytes_per_device"])
    )
    assert abs(chosen["hit_rate"] - advice["hit_rate"]) < 1e-6
    with (tmp_path / "out" / "size.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [
        {key: "" if value is None else str(value) for key, value in row.items()} for row in record["curve"]
    ] == table
    assert (tmp_path / "out" / "size.png").stat().st_size > 10_000
    assert study("report", tmp_path / "out", "--output-dir", tmp_path / "again") == 0
    assert (tmp_path / "again" / "size.png").stat().st_size > 10_000
    again = " ".join(capsys.readouterr().out.split())
    assert f"{chosen['hit_rate'] * 100:.2f}" in again and "no limit" in again
    assert advice["text"] in again
    check_page(tmp_path, record)
    asked = ["report", str(tmp_path / "out"), "--html", str(tmp_path / "no.html"), "--bytes-per-token", "8"]
    assert "has its model's" in told_error(capsys, lambda: cli.main(asked))


def check_page(folder: Path, record: dict[str, Any]) -> None:
    """The page says the recommendation first, draws every policy of the curve, and holds its numbers."""
    assert cli.main(["report", str(folder / "out"), "--html", str(folder / "page.html")]) == 0
    page, advice = Page.read(folder / "page.html"), record["recommendation"]
    assert page.root.first("p", class_="verdict").text == advice["text"]
    section = page.sections()["memory-size"]
    assert {key.text for key in section.first("ul", class_="legend").all("li")} == {
        "lru", "vllm", "opt", "opt-bypass", "vllm, no limit"
    }  # fmt: skip
    assert f"recommended: {size_text(advice['bytes_per_device'])}" in section.first("svg", role="img").text
    rows = page.table("memory-size")
    assert [row["GiB"] for row in rows] == [row["bytes_per_device"] / 2**30 for row in record["curve"][:-1]]
    assert [row["hit rate"] for row in rows] == [row["hit_rate"] for row in record["curve"][:-1]]
    assert "61,464 bytes per token of glm-5" in section.text


def test_sizes_that_are_named_and_one_workload_of_a_file(tmp_path: Path) -> None:
    flags = ("size", "--kv-layout", "deepseek-v3.2", "--gib", 0.0625, 0.02)
    record = study_json(tmp_path / "out", "size.json", *flags)
    assert sorted({row["bytes_per_device"] or 0 for row in record["curve"]}) == [0, 21_474_836, 67_108_864]
    assert record["intervals"]["over"] == "conversations"


def test_an_interval_is_over_requests_where_none_names_its_conversation() -> None:
    alone = requests_of([([1, 2], [], ""), ([1, 3], [], "")])
    assert spread_over([42], [alone], "conversations") == "requests, bootstrapped"
    assert spread_over([42], [alone, chats(2, 2)], "conversations") == "conversations, bootstrapped"
    assert spread_over([42, 43], [alone], "seeds") == "2 seeds"


def test_a_folder_that_holds_something_is_named_once(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "mine").touch()
    code = study("size", "--kv-layout", "glm-5", "--output-dir", tmp_path)
    check_mistake(capsys, code, f"error: {tmp_path}: holds something already")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kv-layout", "gpt-9"), "--kv-layout gpt-9: cannot read it"),
        (("--kv-dtype", "fp16"), "--kv-dtype fp16: with an indexer use fp8 or bf16"),
        (("--gib", 0), "--gib: different sizes above 0: 0"),
        (("--gib", 0.001), "--gib: 1.0 MiB is less than a block"),
        (("--gib", 1, 1.001), "--gib: two sizes hold the same number of blocks"),
        (("--gib", 1e12), "blocks"),
        (("--target", 101), "--target 101: a share in percent"),
        (("--routing", "prefix-affine"), "--routing divides requests over replicas"),
        (("--replicas", 10_000), "--replicas 10000: there are only"),
        (("--block-size", 10**8), "no prompt fills a block of 100000000 tokens; name a smaller --block-size"),
    ],
    ids=lambda value: "_".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(tmp_path: Path, capsys: Any, flags: tuple[Any, ...], message: str) -> None:
    code = study("size", "--kv-layout", "deepseek-v3.2", *flags, "--output-dir", tmp_path / "out")
    check_mistake(capsys, code, message)
    assert not (tmp_path / "out").exists()
