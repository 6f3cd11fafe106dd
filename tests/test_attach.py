"""`dsatrace.attach`: what it records of every family is what an independent hook saw, and `verify` passes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dsatrace
from dsatrace import cli
from dsatrace.errors import UserError
from dsatrace.trace.reader import RunReader
from dsatrace.verify.mismatch import Mismatch
from dsatrace.verify.run import verify
from helpers.families import END, FAMILIES, TOKEN_FAMILIES, VOCABULARY, tiny_model

PROMPT, NEW = 21, 6
Key = tuple[str, int, int, int]
"""Request, step, layer, KV head."""


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, Any]]:
    """Made when they are first asked for."""

    class Models(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            self[name] = tiny_model(name)
            return self[name]

    yield Models()


class Seen:
    """Keeps what every indexer gives, forward by forward: a second, plain watcher."""

    def __init__(self, model: Any) -> None:
        self.forwards: list[dict[int, torch.Tensor]] = []
        self.handles = [model.register_forward_pre_hook(lambda *args: self.forwards.append({}))]
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Indexer"):
                layer = int(name.split("layers.")[1].split(".")[0])
                self.handles.append(module.register_forward_hook(self.keep(layer)))

    def keep(self, layer: int) -> Any:
        return lambda module, args, output: self.forwards[-1].__setitem__(layer, output.clone())

    def close(self) -> list[dict[int, torch.Tensor]]:
        for handle in self.handles:
            handle.remove()
        return self.forwards


def ids_of(output: torch.Tensor, b: int, s: int, head: int) -> list[int]:
    """What an indexer gave for one query: numbers of columns, entries or blocks."""
    row = output[b, s] if output.dim() == 3 else output[b, head, s]
    if output.dtype == torch.bool:
        return [column for column, held in enumerate(row.tolist()) if held]
    return [one for one in row.tolist() if one >= 0]


def expected_sets(
    name: str,
    forwards: list[dict[int, torch.Tensor]],
    masks: list[list[int]],
    first_request: int = 0,
    fed: int = 0,
) -> dict[Key, set[int]]:
    """The sets that the run should hold of one `generate` call without early ends, with all prompt rows that
    it computes: `fed` columns were before it."""
    size, num_prompt = FAMILIES[name].unit_tokens, len(masks[0])
    sets: dict[Key, set[int]] = {}
    for forward in forwards:
        num_new = next(iter(forward.values())).shape[-2]
        for b, mask in enumerate(masks):
            place = {}  # column -> position
            for column in range(fed + num_new):
                if column >= num_prompt or mask[column]:
                    place[column] = len(place)
            for s in range(num_new):
                if fed + s not in place:
                    continue
                position = place[fed + s]
                step = position - sum(mask)
                for layer, output in forward.items():
                    for head in range(output.shape[1] if name == "minimax_m3_vl" else 1):
                        ids = ids_of(output, b, s, head)
                        if size == 1 or name in ("glm5_next", "qwen4_exp"):
                            ids = [place[one] for one in ids if place.get(one, position + 1) <= position]
                        if name in ("glm5_next", "qwen4_exp"):
                            whole = (position + 1) // size * size
                            assert set(range(whole, position + 1)) <= set(ids)  # the tail, always
                            ids = [one for one in ids if one < whole]
                            assert sorted(ids) == sorted(
                                one // size * size + i for one in ids if one % size == 0 for i in range(size)
                            )
                            ids = [one // size for one in ids if one % size == 0]
                        if ids:
                            sets[f"r{first_request + b}", step, layer, head] = set(ids)
        fed += num_new
    return sets


def recorded_sets(folder: Path, shared: bool = False) -> dict[Key, set[int]]:
    """Of the layers that have an indexer or, `shared`, of those that use another's."""
    sets = {}
    for record in RunReader(folder).steps():
        ids = record["selected_token_pos"] if "selected_ids" not in record else record["selected_ids"]
        if ("source_layer" in record) == shared:
            key = record["request_id"], record["step_idx"], record["layer_id"], record.get("kv_head", 0)
            assert key not in sets
            sets[key] = set(ids)
            assert len(sets[key]) == len(ids)
    return sets


def prompts(num: int, length: int = PROMPT, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (num, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    """Greedy and without an end, unless the caller says otherwise."""
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None} | given
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(input_ids=ids, attention_mask=mask, **settings)


def attached(model: Any, folder: Path, **settings: Any) -> Any:
    return dsatrace.attach(model, folder, selections="random_weights", **settings)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_set_is_what_the_indexer_gave(models: dict[str, Any], tmp_path: Path, name: str) -> None:
    model = models[name]
    seen = Seen(model)
    with attached(model, tmp_path / "run", prefill="all"):
        generate(model, prompts(2))
        first = seen.forwards.copy()
        generate(model, prompts(1, 30, seed=2), max_new_tokens=3)
    forwards = seen.close()
    expected = expected_sets(name, first, [[1] * PROMPT] * 2)
    expected |= expected_sets(name, forwards[len(first) :], [[1] * 30], first_request=2)
    assert recorded_sets(tmp_path / "run") == expected
    found = verify(tmp_path / "run")
    assert (found.state, found.num_requests, found.faults) == ("complete", 3, ())
    manifest = RunReader(tmp_path / "run").manifest
    assert manifest["selection"]["sparse_active"] > 0
    assert manifest["selection"]["unit_tokens"] == FAMILIES[name].unit_tokens
    for record in RunReader(tmp_path / "run").steps():
        assert record["scores_stats"] is None
        assert record["kth_margin"] is None
        assert record["kv_fetch"] is None
        assert record["step_wall_us"] > 0


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("prefill", ["off", "last"])
def test_rows_of_the_prompt(models: dict[str, Any], tmp_path: Path, name: str, prefill: str) -> None:
    model = models[name]
    seen = Seen(model)
    with attached(model, tmp_path / "run", prefill=prefill):
        generate(model, prompts(2))
    expected = expected_sets(name, seen.close(), [[1] * PROMPT] * 2)
    first = {"off": 0, "last": -1}[prefill]
    assert recorded_sets(tmp_path / "run") == {key: ids for key, ids in expected.items() if key[1] >= first}
    assert {key[1] for key in expected if key[1] >= first} == set(range(first, NEW - 1))
    verify(tmp_path / "run")


@pytest.mark.parametrize("name", ["glm_moe_dsa", "hy_v4", "hy_v4_vl", "mistral_large4", "glm5_next"])
def test_layers_that_share_a_selection(models: dict[str, Any], tmp_path: Path, name: str) -> None:
    model = models[name]
    with attached(model, tmp_path / "run"):
        generate(model, prompts(1))
    layers = RunReader(tmp_path / "run").manifest["selection"]["layers"]
    sources = {
        i: layer["source_layer"] for i, layer in enumerate(layers) if layer["source_layer"] is not None
    }
    assert sources == ({2: 1, 3: 1} if name.startswith("hy_v4") else {2: 1})
    own, shared = recorded_sets(tmp_path / "run"), recorded_sets(tmp_path / "run", shared=True)
    assert len(shared) == len(sources) * (NEW - 1)
    for (request, step, layer, head), ids in shared.items():
        assert ids == own[request, step, sources[layer], head]


def test_what_is_read_in_any_case_stands_in_the_manifest(models: dict[str, Any], tmp_path: Path) -> None:
    for name, always in (
        ("deepseek_v4", {"sinks": 0, "window": 8, "tail": 0}),
        ("glm5_next", {"sinks": 0, "window": 0, "tail": 3}),
        ("qwen4_exp", {"sinks": 0, "window": 0, "tail": 3}),
    ):
        with attached(models[name], tmp_path / name):
            generate(models[name], prompts(1))
        layers = RunReader(tmp_path / name).manifest["selection"]["layers"]
        found = [layer.get("always_selected") for layer in layers if layer["heads"]]
        assert found == [always] * len(found)


PADDING = (
    *((name, side) for name in (*TOKEN_FAMILIES, "qwen4_exp") for side in ("left", "right")),
    ("glm5_next", "left"),
)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of different lengths, and their mask."""
    ids, mask = prompts(3), torch.ones(3, PROMPT, dtype=torch.long)
    for row, missing in ((1, 3), (2, 9)):
        gap = slice(0, missing) if side == "left" else slice(PROMPT - missing, PROMPT)
        ids[row, gap] = mask[row, gap] = 0
    return ids, mask


@pytest.mark.parametrize(("name", "side"), PADDING)
def test_positions_are_columns_without_padding(
    models: dict[str, Any], tmp_path: Path, name: str, side: str
) -> None:
    model = models[name]
    ids, mask = padded(side)
    seen = Seen(model)
    with attached(model, tmp_path / "run", prefill="all"):
        generate(model, ids, mask)
    assert recorded_sets(tmp_path / "run") == expected_sets(name, seen.close(), mask.tolist())
    verify(tmp_path / "run")
    requests = [json.loads(line) for line in (tmp_path / "run/requests.jsonl").open()]
    assert [request["num_prompt_tokens"] for request in requests] == [PROMPT, PROMPT - 3, PROMPT - 9]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        *((name, side) for name in ("deepseek_v4", "minimax_m3_vl") for side in ("left", "right")),
        ("glm5_next", "right"),
    ],
)
def test_padding_that_shifts_groups_is_refused(
    models: dict[str, Any], tmp_path: Path, name: str, side: str
) -> None:
    said = (
        f"padded on the {side}: in {name}.* padding shifts which tokens the (entry|block) of 4 tokens holds"
    )
    with pytest.raises(UserError, match=said), attached(models[name], tmp_path / "run"):
        generate(models[name], *padded(side))
    assert RunReader(tmp_path / "run").state == "incomplete"


class Scores:
    """Keeps the scores that every indexer takes its top-k of, forward by forward."""

    def __init__(self, model: Any, patch: pytest.MonkeyPatch) -> None:
        self.forwards: list[dict[int, torch.Tensor]] = []
        self._layer: int | None = None
        self._handles = [model.register_forward_pre_hook(lambda *args: self.forwards.append({}))]
        for name, module in model.named_modules():
            if type(module).__name__.endswith("Indexer"):
                layer = int(name.split("layers.")[1].split(".")[0])
                self._handles += [
                    module.register_forward_pre_hook(self._begin(layer)),
                    module.register_forward_hook(self._begin(None)),
                ]
        plain = torch.Tensor.topk

        def topk(scores: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._layer is not None:
                self.forwards[-1][self._layer] = scores.clone()
            return plain(scores, *args, **kwargs)

        patch.setattr(torch.Tensor, "topk", topk)

    def _begin(self, layer: int | None) -> Any:
        return lambda *args: setattr(self, "_layer", layer)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


@pytest.mark.parametrize("name", TOKEN_FAMILIES)
def test_padding_changes_a_set_only_by_a_tie(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The first set that differs from that of the prompt alone, in the order of execution, is a tie; what
    comes later may follow from it, and is counted."""
    model, (ids, mask) = models[name], padded("left")
    with attached(model, tmp_path / "batch", prefill="all"):
        answers = generate(model, ids, mask)
    batch = recorded_sets(tmp_path / "batch")
    num_later = 0
    for row in range(len(ids)):
        length = int(mask[row].sum())
        scores = Scores(model, monkeypatch)
        with attached(model, tmp_path / f"alone{row}", prefill="all"):
            answer = generate(model, ids[row : row + 1, PROMPT - length :])
        scores.close()
        both = zip(answer[0, length:].tolist(), answers[row, PROMPT:].tolist(), strict=True)
        num_equal = next((i for i, (one, other) in enumerate(both) if one != other), NEW)
        alone = recorded_sets(tmp_path / f"alone{row}")
        differing = sorted(
            (max(step, -1), layer, step)
            for (_, step, layer, _), found in alone.items()
            if step < num_equal and batch[f"r{row}", step, layer, 0] != found
        )
        assert num_equal == NEW or differing  # another token follows from another set
        for forward, layer, step in differing:
            if (forward, layer) != differing[0][:2]:
                num_later += 1
                continue
            of_query = scores.forwards[forward + 1][layer][0, length + step if step < 0 else 0]
            found = alone["r0", step, layer, 0]
            kth = min(of_query[one].item() for one in found)
            for one in found ^ batch[f"r{row}", step, layer, 0]:
                assert of_query[one].item() == pytest.approx(kth, rel=1e-5, abs=1e-6)
    assert num_later <= len(batch) // 5


def test_the_check_for_ties_sees_another_set(models: dict[str, Any]) -> None:
    """Scores of one query are apart, so that a set that is not the k best would be found."""
    with pytest.MonkeyPatch.context() as patch:
        scores = Scores(models["deepseek_v32"], patch)
        generate(models["deepseek_v32"], prompts(1), max_new_tokens=2)
        scores.close()
    of_query = scores.forwards[1][3][0, 0].sort(descending=True).values
    assert of_query[7] - of_query[12] > 1e-3


def test_a_sequence_that_ended_is_left_out(models: dict[str, Any], tmp_path: Path) -> None:
    """A batch goes on until its last sequence ends; the others are fed padding."""
    model = models["deepseek_v32"]
    free = generate(model, prompts(3), max_new_tokens=10)[:, PROMPT:].tolist()
    end = free[0][4]
    lengths = [answer.index(end) + 1 if end in answer else len(answer) for answer in free]
    assert len(set(lengths)) > 1
    for return_dict in (False, True):
        folder = tmp_path / str(return_dict)
        with attached(model, folder, prefill="last"):
            generate(
                *(model, prompts(3)),
                max_new_tokens=10,
                eos_token_id=[end, END],
                return_dict_in_generate=return_dict,
            )
        requests = [json.loads(line) for line in (folder / "requests.jsonl").open()]
        assert [request["num_output_tokens"] for request in requests] == lengths
        ended = ["stop" if end in answer else "length" for answer in free]
        assert [request["state"] for request in requests] == ended
        steps = {(request, step) for request, step, _, _ in recorded_sets(folder)}
        assert steps == {
            (f"r{row}", step) for row, length in enumerate(lengths) for step in range(-1, length - 1)
        }
        verify(folder)


def test_ways_to_generate(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["glm_moe_dsa"]
    ways: dict[str, dict[str, Any]] = {
        "chunks": {"prefill_chunk_size": 8},
        "static": {"cache_implementation": "static"},
        "sampled": {"do_sample": True},
        "no mask": {"attention_mask": None},
    }
    for way, given in ways.items():
        seen = Seen(model)
        with attached(model, tmp_path / way, prefill="all"):
            model.generate(**{"input_ids": prompts(1), "max_new_tokens": NEW, "do_sample": False} | given)
        forwards = seen.close()
        assert recorded_sets(tmp_path / way) == expected_sets("glm_moe_dsa", forwards, [[1] * PROMPT]), way
        assert len(forwards) == (NEW + 2 if way == "chunks" else NEW)
        verify(tmp_path / way)
    with attached(model, tmp_path / "several", prefill="last"):
        generate(model, prompts(2), num_return_sequences=2, do_sample=True)
    requests = [json.loads(line) for line in (tmp_path / "several/requests.jsonl").open()]
    assert [request["request_id"] for request in requests] == ["r0", "r1", "r2", "r3"]
    verify(tmp_path / "several")


def test_another_forward_within_generate_is_not_recorded(models: dict[str, Any], tmp_path: Path) -> None:
    """Classifier-free guidance runs the model a second time per step."""
    model = models["deepseek_v32"]
    seen = Seen(model)
    with attached(model, tmp_path / "run", prefill="all"):
        generate(model, prompts(1), guidance_scale=1.5)
    forwards = seen.close()
    assert len(forwards) == 2 * NEW
    assert recorded_sets(tmp_path / "run") == expected_sets("deepseek_v32", forwards[::2], [[1] * PROMPT])
    verify(tmp_path / "run")


def test_a_share_of_the_steps(models: dict[str, Any], tmp_path: Path) -> None:
    with attached(models["deepseek_v32"], tmp_path / "run", sample_rate=0.4, seed=3):
        generate(models["deepseek_v32"], prompts(2), max_new_tokens=20)
    steps = {step for _, step, _, _ in recorded_sets(tmp_path / "run")}
    assert 0 < len(steps) < 19
    verify(tmp_path / "run")


def test_a_conversation_goes_on_from_its_cache(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["deepseek_v32"]
    first = generate(model, prompts(1), return_dict_in_generate=True)
    longer = torch.cat([first.sequences, prompts(1, 9, seed=5)], dim=1)
    seen = Seen(model)
    with attached(model, tmp_path / "on", prefill="last"):
        generate(model, longer, cache=first.cache)
    num_known = PROMPT + NEW - 1  # the last token was never fed
    mask = [[1] * longer.shape[1]]
    expected = expected_sets("deepseek_v32", seen.close(), mask, fed=num_known)
    assert recorded_sets(tmp_path / "on") == {key: ids for key, ids in expected.items() if key[1] >= -1}
    assert min(step for _, step, _, _ in expected) == -10
    verify(tmp_path / "on")
    again = generate(model, prompts(1), return_dict_in_generate=True)
    with (
        pytest.raises(UserError, match="positions of the prompt are computed already"),
        attached(model, tmp_path / "all", prefill="all"),
    ):
        generate(model, longer, cache=again.cache)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 2}, "num_beams 2: beam search"),
        ({"assistant_model": "itself"}, "assistant_model: several tokens per forward"),
        ({"prompt_lookup_num_tokens": 3}, "prompt_lookup_num_tokens 3: several tokens"),
        ({"use_cache": False}, "use_cache False: each step"),
        ({"stop_strings": "x"}, "of several prompts nobody sees which has ended"),
        ({"custom_generate": "someone/else"}, "custom_generate: a loop of another's"),
        (
            {"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 32)},
            "inputs_embeds: prompts are known",
        ),
        ({"input_ids": None}, "no input_ids"),
    ],
)
def test_what_generate_may_not_do(
    models: dict[str, Any], tmp_path: Path, given: dict[str, Any], said: str
) -> None:
    model = models["deepseek_v32"]
    if given.get("assistant_model") == "itself":
        given = {"assistant_model": model}
    with attached(model, tmp_path / "run", prefill="last"):
        generate(model, prompts(1))
        with pytest.raises(UserError, match=said):
            model.generate(**{"input_ids": prompts(2), "max_new_tokens": 2, **given})
    assert verify(tmp_path / "run").num_requests == 1


def test_the_settings_of_the_model_count_too(models: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model("deepseek_v32")
    model.generation_config.num_beams = 3
    with pytest.raises(UserError, match="num_beams 3"), attached(model, tmp_path / "run"):
        generate(model, prompts(1))


def test_models_without_an_indexer_are_refused_by_name(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel  # late: every worker collects this file

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=16))
    with pytest.raises(UserError, match=r"gpt2: no layer has an indexer.* deepseek_v32, .*qwen4_exp"):
        dsatrace.attach(model, tmp_path / "run")
    with pytest.raises(UserError, match=r"Linear is no transformers model .*glm5_next"):
        dsatrace.attach(torch.nn.Linear(2, 2), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_settings_are_checked_before_anything_is_written(models: dict[str, Any], tmp_path: Path) -> None:
    for settings, said in (
        ({"prefil": "all"}, "attach: prefil is no setting"),
        ({"prefill": "some"}, "use off, last or all"),
        ({"store_scores": True}, "store_scores is no setting"),
        ({"selections": "good"}, "use model or random_weights"),
        ({"block_size": 0}, "use at least 1 token"),
    ):
        with pytest.raises(UserError, match=said):
            dsatrace.attach(models["deepseek_v32"], tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(UserError, match="holds files already"):
        dsatrace.attach(models["deepseek_v32"], tmp_path / "full")


def test_a_run_without_rows_is_an_error(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["deepseek_v32"]
    with (
        pytest.raises(UserError, match=r"generate was not called \(1 forwards outside"),
        attached(model, tmp_path / "outside"),
    ):
        model(input_ids=prompts(1))
    with (
        pytest.raises(UserError, match="no decode step ran; raise max_new_tokens"),
        attached(model, tmp_path / "short"),
    ):
        generate(model, prompts(1), max_new_tokens=1)
    assert RunReader(tmp_path / "short").state == "incomplete"


def test_nothing_is_left_on_the_model(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["deepseek_v32"]
    plain = generate(model, prompts(2)).tolist()
    trace = attached(model, tmp_path / "run")
    assert generate(model, prompts(2)).tolist() == plain
    assert "generate" in vars(model)
    trace.close()
    trace.close()
    assert "generate" not in vars(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert verify(tmp_path / "run").num_requests == 2


def test_a_forward_that_fails_leaves_what_was_recorded(models: dict[str, Any], tmp_path: Path) -> None:
    model = models["deepseek_v32"]
    norm, calls = model.model.norm, []

    def fail(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise ZeroDivisionError("a fault of the model's")

    with attached(model, tmp_path / "run", prefill="last"):
        handle = norm.register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            generate(model, prompts(1))
        handle.remove()
        generate(model, prompts(1))
    assert len(calls) == 4
    found = verify(tmp_path / "run")
    assert (found.state, found.num_requests) == ("complete", 2)
    states = {request["request_id"]: request["state"] for request in RunReader(tmp_path / "run").requests()}
    assert states == {"r0": "unfinished", "r1": "length"}
    steps = {(request, step) for request, step, _, _ in recorded_sets(tmp_path / "run")}
    assert {step for request, step in steps if request == "r0"} == {-1, 0, 1}


def test_no_prompt_stands_in_a_run(models: dict[str, Any], tmp_path: Path) -> None:
    ids = torch.tensor([[91, 92, 93, 94, 95] * 5])
    with attached(models["deepseek_v32"], tmp_path / "run"):
        generate(models["deepseek_v32"], ids)
    for path in (tmp_path / "run").iterdir():
        assert "91,92,93" not in path.read_text().replace(" ", "")


def test_equal_prompts_share_a_prefix(models: dict[str, Any], tmp_path: Path) -> None:
    with attached(models["deepseek_v32"], tmp_path / "run", prefill="all", block_size=4):
        for _ in range(2):
            generate(models["deepseek_v32"], prompts(1), max_new_tokens=3)
    cached = {
        record["request_id"]: record["prefix"]["prefix_cached_blocks"]
        for record in RunReader(tmp_path / "run").steps()
    }
    assert cached == {"r0": 0, "r1": PROMPT // 4}
    verify(tmp_path / "run")


@pytest.mark.parametrize("name", ["glm_moe_dsa", "deepseek_v4", "minimax_m3_vl"])
def test_what_follows_a_run_takes_it(
    models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Parquet, and several parts per forward, too."""
    folder = tmp_path / "run"
    with attached(models[name], folder, prefill="all", format="parquet"):
        generate(models[name], prompts(2, 40), max_new_tokens=12)
    for command in (
        ["verify", str(folder)],
        ["summarize", str(folder)],
        ["report", str(folder)],
        ["replay", str(folder), "--sizes", "2k", "--out", str(tmp_path / "replay"), "--no-figure"],
        ["replay", str(folder), "--start", "prefill", "--out", str(tmp_path / "warm"), "--no-figure"],
        ["export", str(folder), "--to", "jsonl", "--out", str(tmp_path / "lines")],
        ["check", str(folder)],
        ["diff", str(folder), str(folder), "--no-figure"],
    ):
        assert cli.main(command) == 0, (command, capsys.readouterr().err)
    verify(tmp_path / "lines")
    own = recorded_sets(tmp_path / "lines")
    request, layer = "r1", min(layer for _, _, layer, _ in own)
    loaded = dsatrace.load(folder).selections(request, layer)
    expected = {
        step: ids for (name, step, at, head), ids in own.items() if (name, at, head) == ("r1", layer, 0)
    }
    assert {int(step) for step in loaded.step_idx} == set(expected)


def test_a_long_prompt_is_written_in_parts(
    models: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models["deepseek_v32"]
    with attached(model, tmp_path / "whole", prefill="all"):
        generate(model, prompts(2))
    monkeypatch.setattr("dsatrace.captures.forward_rows._CAPTURE_BYTES", 4 * 4 * 8 * 5)
    with attached(model, tmp_path / "parts", prefill="all") as trace:
        generate(model, prompts(2))
    assert trace.tracer._writer.cost.traced_steps == 9 + NEW - 1
    assert recorded_sets(tmp_path / "parts") == recorded_sets(tmp_path / "whole")
    for name in ("whole", "parts"):
        verify(tmp_path / name)
        counts = RunReader(tmp_path / name).summary()["counts"]
        assert (counts["prefills"], counts["steps"]) == (1, NEW - 1)


def test_all_says_its_size_first(
    models: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with attached(models["deepseek_v32"], tmp_path / "run", prefill="all"):
        generate(models["deepseek_v32"], prompts(2), max_new_tokens=2, prefill_chunk_size=8)
    said = f"prefill all: {2 * PROMPT} prompt positions x 4 sets of up to 8 ids: 0 MiB in memory"
    assert capsys.readouterr().err.count(said) == 1


def test_the_import_costs_nothing() -> None:
    script = """
import sys, dsatrace
dsatrace.attach
assert not {"torch", "transformers"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_verify_sees_a_prompt_row_that_is_missing(models: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with attached(models["deepseek_v4"], folder, prefill="all"):
        generate(models["deepseek_v4"], prompts(1))
    lines = (folder / "trace_steps.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step_idx"] for line in lines]
    assert steps[0] == 3 - PROMPT  # the first position that sees a whole entry
    manifest = json.loads((folder / "manifest.json").read_text()) | {"files": None, "state": "complete"}

    def found(kept: list[str], **trace: Any) -> str:
        copy = tmp_path / "copy"
        copy.mkdir(exist_ok=True)
        for name in ("requests.jsonl", "summary.json"):
            (copy / name).write_text((folder / name).read_text())
        (copy / "trace_steps.jsonl").write_text("".join(f"{line}\n" for line in kept))
        (copy / "manifest.json").write_text(json.dumps(manifest | {"trace": manifest["trace"] | trace}))
        with pytest.raises(Mismatch) as mismatch:
            verify(copy)
        return str(mismatch.value)

    for step in (steps[0], -9, -1):
        kept = [line for line, of in zip(lines, steps, strict=True) if of != step]
        assert "1 sampled steps of the request are missing" in found(kept), step
    end = steps.index(-4)
    assert "step_idx: stored -5, after -5" in found(lines[:end] + lines[end - 4 :])
    assert "trace.prefill" in found(lines, prefill="most")
    assert "below -1" in found(lines, prefill="last")
    assert "records no prefill" in found(
        [line for line, of in zip(lines, steps, strict=True) if of >= -1], prefill="off"
    )
