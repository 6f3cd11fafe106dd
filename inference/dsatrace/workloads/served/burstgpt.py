"""BurstGPT as requests: logged arrivals and lengths, with prompts made up to those lengths.

    workload = BurstGPTWorkload(Replay(read_burstgpt("BurstGPT_1.csv")), SyntheticPrompts(3, 256), bad_rows)

A request asks for as many tokens as the log's response had (at most `max_new_tokens`), and
runs to that length: the load is the log's, whatever the model says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dsatrace.workloads.burstgpt import Replay
from dsatrace.workloads.burstgpt_synthetic import SyntheticPrompts
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit


class BurstGPTWorkload:
    name = "burstgpt"
    metric = None

    def __init__(
        self,
        replay: Replay,
        prompts: SyntheticPrompts,
        bad_rows: BadRows,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
    ) -> None:
        check_limit("--max-new-tokens-cap", max_new_tokens)
        self._replay = replay
        self._prompts = prompts
        self._bad_rows = bad_rows
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._num_capped = 0

    def requests(self) -> Iterator[Request]:
        for arrival in self._replay:
            wanted = max(1, arrival.row.response_tokens)  # a failure, if kept, asks for one token
            granted = min(wanted, self._max_new_tokens or wanted)
            self._num_capped += granted < wanted
            yield Request(
                request_id=f"row{arrival.row.source_row}",
                prompt_token_ids=self._prompts.token_ids(arrival.row),
                max_new_tokens=granted,
                temperature=self._temperature,
                arrival_s=arrival.arrival_s,
                source_row=arrival.row.source_row,
                stop_at_eos=False,
            )

    def judge(self, request_id: str, answer: str) -> None:
        return None

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The log has lengths only: as many tokens, all of one id that means nothing."""
        return (self._prompts.first_token_id,) * request.max_new_tokens

    def forget(self, request_id: str) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "prompts": "synthetic: random tokens of the logged lengths",
            "shared_prefix_share": self._prompts.shared_share,
            "time_scale": self._replay.time_scale,
            "counts": {**self._replay.summary(), "answers_capped": self._num_capped},
            "bad_rows": self._bad_rows.summary(),
        }
