"""Data sets as they are served: what each row asks, what an answer is worth, where the needle lies."""

from __future__ import annotations

import json

import pytest

from dsatrace.errors import UserError
from dsatrace.workloads.burstgpt import Arrivals, BurstGPTWorkload, read_burstgpt
from dsatrace.workloads.burstgpt_synthetic import SyntheticPrompts
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import PromptSettings
from dsatrace.workloads.longbench_v2 import LongBenchV2Loader, LongBenchV2Workload
from dsatrace.workloads.rows import BadRows
from dsatrace.workloads.ruler.generator import generate
from dsatrace.workloads.ruler.reader import read_examples
from dsatrace.workloads.ruler.workload import RulerWorkload
from dsatrace.workloads.samples import sample_file
from dsatrace.workloads.sharegpt import ShareGPTLoader, ShareGPTWorkload
from helpers.real_data import real_file


@pytest.fixture
def prompts(byte_tokenizer):
    return PromptSettings(Chat.deepseek(byte_tokenizer))


def ruler(prompts, task="niah_single_1", length=1500, n=3, **options):
    examples = generate(task, length, prompts.chat.tokenizer, n, overhead_tokens=4)  # 2 before, 2 behind
    return RulerWorkload(examples, prompts, **options)


class TestRuler:
    def test_the_needle_positions_hold_the_answer(self, prompts, byte_tokenizer):
        examples = list(generate("niah_multivalue", 3000, byte_tokenizer, 2))
        for example, request in zip(examples, RulerWorkload(examples, prompts).requests(), strict=True):
            held = byte_tokenizer.decode(request.prompt_token_ids[p] for p in request.needle_positions)
            assert sorted(example.references) == sorted(held[i : i + 7] for i in range(0, len(held), 7))

    def test_the_prompt_and_its_answer_fill_the_length_asked_for(self, prompts):
        for request in ruler(prompts).requests():
            assert 1400 < len(request.prompt_token_ids) + request.max_new_tokens <= 1500

    def test_a_score_for_the_right_answer_and_none_for_another(self, prompts, byte_tokenizer):
        workload = ruler(prompts)
        for request in workload.requests():
            right = byte_tokenizer.decode(workload.recorded(request))
            assert workload.judge(request.request_id, right) == 100
            assert workload.judge(request.request_id, "no idea") == 0
            workload.forget(request.request_id)
            with pytest.raises(KeyError):
                workload.judge(request.request_id, right)

    def test_a_limit_counts_all_and_another_each_task(self, prompts, byte_tokenizer):
        examples = [e for task in ("vt", "niah_single_1") for e in generate(task, 2000, byte_tokenizer, 3)]
        assert [request.labels["task"] for request in RulerWorkload(examples, prompts, 4).requests()] == [
            *("vt", "vt", "vt", "niah_single_1")
        ]
        both = RulerWorkload(examples, prompts, 3, limit_per_task=2)
        assert [request.labels["task"] for request in both.requests()] == ["vt", "vt", "niah_single_1"]
        workload = RulerWorkload(examples, prompts, limit_per_task=2)
        labels = [request.labels["task"] for request in workload.requests()]
        assert labels == ["vt", "vt", "niah_single_1", "niah_single_1"]
        assert workload.describe()["counts"] == {"examples": 4, "vt": 2, "niah_single_1": 2}

    def test_ids_tell_tasks_lengths_and_rows_apart(self, prompts, byte_tokenizer):
        examples = [
            example
            for task in ("vt", "niah_single_1")
            for length in (2000, 3000)
            for example in generate(task, length, byte_tokenizer, 2)
        ]
        ids = [request.request_id for request in RulerWorkload(examples, prompts).requests()]
        assert len(set(ids)) == 8

    def test_real_rows_are_asked_with_their_whole_input(self, prompts):
        for example in (examples := list(read_examples(real_file("ruler")))):
            assert len(example.prompt) > 1000
        requests = list(RulerWorkload(examples, prompts).requests())
        assert len(requests) == len(examples)
        assert all(r.needle_positions for r in requests if r.labels["task"].startswith("niah"))
        assert not any(r.needle_positions for r in requests if r.labels["task"] in ("qa_1", "cwe", "fwe"))


class TestLongBenchV2:
    def test_a_prompt_is_cut_to_its_limit(self, byte_tokenizer):
        loader = LongBenchV2Loader(sample_file("longbench_v2"))
        workload = LongBenchV2Workload(
            loader, PromptSettings(Chat.deepseek(byte_tokenizer), max_prompt_tokens=900)
        )
        requests = list(workload.requests())
        assert [len(r.prompt_token_ids) for r in requests] == [900] * 3
        assert workload.describe()["counts"]["truncated"] == 3
        assert requests[0].labels.keys() == {"difficulty", "length"}

    def test_the_right_letter_scores(self, prompts, byte_tokenizer):
        workload = LongBenchV2Workload(LongBenchV2Loader(sample_file("longbench_v2")), prompts)
        for request in workload.requests():
            right = byte_tokenizer.decode(workload.recorded(request))
            assert workload.judge(request.request_id, right) == 1
            assert workload.judge(request.request_id, "(A)") == 0
            assert workload.judge(request.request_id, "The correct answer is (E)") == 0
        assert workload.describe()["counts"]["unanswered"] == 6


class TestShareGPT:
    def test_turns_share_their_prefixes(self, prompts):
        workload = ShareGPTWorkload(sample_loader(), prompts, "per_user_turn")
        requests = {request.request_id: request for request in workload.requests()}
        first, second = requests["row0.turn0"], requests["row0.turn1"]
        shared_tokens = first.prompt_token_ids[
            :-1
        ]  # the last closes the thinking, as the answer's first does
        assert second.prompt_token_ids[: len(shared_tokens)] == shared_tokens
        assert len(second.prompt_token_ids) > len(first.prompt_token_ids)

    def test_full_mode_asks_the_last_turn_only(self, prompts):
        full = list(ShareGPTWorkload(sample_loader(), prompts, "full").requests())
        turns = list(ShareGPTWorkload(sample_loader(), prompts, "per_user_turn").requests())
        last = {request.source_row: request.prompt_token_ids for request in turns}
        assert {request.source_row: request.prompt_token_ids for request in full} == last
        assert len(full) < len(turns)

    def test_the_recorded_answer_and_the_limit(self, prompts, byte_tokenizer):
        workload = ShareGPTWorkload(sample_loader(), prompts, limit=2)
        requests = list(workload.requests())
        assert len(requests) == 2
        rows = json.loads(sample_file("sharegpt").read_text())
        last_answer = rows[0]["conversations"][-1]
        assert last_answer["from"] == "gpt"
        assert byte_tokenizer.decode(workload.recorded(requests[0])) == last_answer["value"]
        assert workload.judge(requests[0].request_id, "anything") is None


class TestBurstGPT:
    def test_lengths_and_arrivals_are_the_logs(self):
        rows = [row for row in read_burstgpt(sample_file("burstgpt")) if not row.failed]
        arrivals = Arrivals(read_burstgpt(sample_file("burstgpt")), time_scale=0.5)
        workload = BurstGPTWorkload(arrivals, SyntheticPrompts(3, 256), BadRows(), max_new_tokens=8)
        requests = list(workload.requests())
        assert [len(r.prompt_token_ids) for r in requests] == [max(1, row.request_tokens) for row in rows]
        assert [r.max_new_tokens for r in requests] == [min(8, row.response_tokens) for row in rows]
        start = rows[0].timestamp_s
        assert [r.arrival_s for r in requests] == [(row.timestamp_s - start) * 0.5 for row in rows]
        assert workload.describe()["counts"]["answers_capped"] == sum(row.response_tokens > 8 for row in rows)
        assert not any(request.stop_at_eos for request in requests)
        assert len(workload.recorded(requests[0])) == requests[0].max_new_tokens


@pytest.mark.parametrize("bad", [{"max_new_tokens": 0}, {"max_prompt_tokens": -1}])
def test_impossible_counts_are_refused(byte_tokenizer, bad):
    with pytest.raises(UserError, match="use at least 1"):
        PromptSettings(Chat.deepseek(byte_tokenizer), **bad)


def sample_loader():
    return ShareGPTLoader(sample_file("sharegpt"))
