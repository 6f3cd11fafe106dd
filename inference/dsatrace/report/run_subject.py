"""What a run's panels draw: its summary, and of its records those of one layer and request.

subject = RunSubject(RunReader(folder))
subject.layer, subject.why_layer        # (1, "selects most of the answer")
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from ..errors import UserError
from ..trace.reader import RunReader
from .tables import Summary, model_name, run_kind, unit_text

MAX_STEPS = 1000
"""Columns of the map. More would be narrower than a pixel."""
_FIELDS = (
    *("request_id", "layer_id", "kv_head", "step_idx", "phase", "path", "seq_len_current"),
    *("unique_token_pos_count", "block_size_tokens", "selected_token_pos"),
)


class RunSubject:
    """Reads the records once, when the first panel asks for what only they tell."""

    def __init__(self, run: RunReader, layer: int | None = None) -> None:
        """`layer` is the map's. Raises a `UserError` if the run does not have it."""
        self.run, self.summary = run, run.summary()
        self.kind = run_kind(run.manifest)
        if layer is not None and not 0 <= layer < len(self.kind.layers):
            raise UserError(f"--layer {layer}: the run has layers 0 to {len(self.kind.layers) - 1}")
        self.layer, self.why_layer = (layer, "as asked") if layer is not None else self._telling_layer()

    def _telling_layer(self) -> tuple[int, str]:
        """The layer that finds the answer; else the one that moves most; else the last."""
        layers = sorted(set(self.kind.set_layers.tolist()))
        recall = _of_layers(self.summary.get("needle_recall"), layers)
        overlap = _of_layers(self.summary["step_overlap"], layers)
        if recall:
            return max(recall, key=lambda layer: recall[layer]), "selects most of the answer"
        if len(overlap) > 1:
            return min(overlap, key=lambda layer: overlap[layer]), "least overlap with the step before"
        return (layers[-1], "the last") if layers else (0, "")

    @functools.cached_property
    def _read(self) -> tuple[Counter[int], Counter[int], list[dict[str, Any]]]:
        contexts: Counter[int] = Counter()
        sizes: Counter[int] = Counter()
        of_map: list[dict[str, Any]] = []
        for record in self.run.steps(_FIELDS):
            num_selected = record["unique_token_pos_count"] or 0
            contexts[record["seq_len_current"]] += num_selected
            sizes[num_selected] += num_selected
            is_shown = record["layer_id"] == self.layer and record.get("kv_head", 0) == 0
            if not is_shown or record["phase"] == "prefill" or len(of_map) == MAX_STEPS:
                continue
            if of_map and record["request_id"] != of_map[0]["request_id"]:
                continue
            if of_map or record["path"] == "sparse":
                of_map.append(record)
        return contexts, sizes, of_map

    @property
    def contexts(self) -> Counter[int]:
        """Selected tokens, by the tokens that their query could see."""
        return self._read[0]

    @property
    def sizes(self) -> Counter[int]:
        """Selected tokens, by how many their selection has."""
        return self._read[1]

    @property
    def map_records(self) -> list[dict[str, Any]]:
        """The decode records of `layer`, and its first KV head, of the first request past top-k."""
        return self._read[2]

    def facts(self, *own: object, pooled: bool = False) -> list[str]:
        """Of a panel over all layers and steps: means, or `pooled`."""
        counts, num_layers = self.summary["counts"], len(self.kind.layers)
        requests = several(counts["requests"], "request")
        if counts["requests"] > 1 and not pooled:
            requests = f"mean of {requests}"
        steps = several(counts["steps"], "decode step")
        layers = several(num_layers, "layer")
        return [model_name(self.run.manifest), requests, layers, *map(str, own), self.unit, steps]

    @property
    def unit(self) -> str:
        return f"unit: {unit_text(self.kind)}"


def several(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count:,} {what}s"


def _of_layers(section: Summary | None, layers: list[int]) -> dict[int, float]:
    shares = (section or {}).get("per_layer") or []
    return {layer: shares[layer] for layer in layers if layer < len(shares) and shares[layer] is not None}
