"""What to replay, and the command-line flags that say so.

Sizes count ids of the run's own unit: tokens, compressed entries, blocks or experts. Knows no run.

    settings = ReplaySettings(policies=("lru", "opt"), sizes=parse_sizes("1k,2k,25%"))
    settings.sizes[1].ids(top_k=2048, context=131072)      # 4096
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dsatrace.errors import UserError

Start = Literal["empty", "first-b", "first-set", "prefill"]
Share = Literal["none", "request", "prefix"]
WhichSteps = Literal["all", "answer"]

OWN_BUFFERS = ("sglang", "window")
"""Policies that know where an id lies in its request, so that no two requests or layers can share."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)(k|%)?")
_USE_SIZES = "use a number of ids, a multiple of top-k such as 2k, or a share of the context such as 10%"


class Size(NamedTuple):
    """A buffer's size as the user wrote it."""

    label: str
    value: float
    kind: Literal["ids", "top_k", "context"]

    def ids(self, top_k: int, context: int) -> int:
        """In ids; `context` is how many a request's last step can choose from."""
        of = {"ids": 1.0, "top_k": float(top_k), "context": context / 100}[self.kind]
        return math.ceil(round(self.value * of, 6))


def usual_size(labels: Sequence[str]) -> str:
    """Of replayed sizes, the one to speak of where none is chosen: the engines' default, else the first."""
    return "2k" if "2k" in labels else labels[0]


def parse_sizes(text: str) -> tuple[Size, ...]:
    """`2048,4096`, `1k,2k` or `10%,25%`, or a mixture."""
    sizes: dict[str, Size] = {}
    for part in text.split(","):
        match = _SIZE.fullmatch(part.strip())
        if match is None or not float(match[1]) > 0:
            raise UserError(f"--sizes {part.strip() or text}: {_USE_SIZES}")
        kind: Any = {None: "ids", "k": "top_k", "%": "context"}[match[2]]
        if kind == "ids" and "." in match[1]:
            raise UserError(f"--sizes {part.strip()}: {_USE_SIZES}")
        if kind == "context" and float(match[1]) > 100:
            raise UserError(f"--sizes {part.strip()}: the context is 100%")
        sizes[part.strip()] = Size(part.strip(), float(match[1]), kind)
    return tuple(sizes.values())


@dataclasses.dataclass(frozen=True)
class ReplaySettings:
    """How selections are replayed; every mistake raises `UserError` naming the flag."""

    policies: tuple[str, ...] = ("lru", "sglang", "fifo", "random", "opt")
    sizes: tuple[Size, ...] = parse_sizes("1k,2k,4k")
    block: int | None = None  # tokens per block that is moved as one; None: the run's own unit
    pin_newest: bool = False  # the query's own token hits in a slot outside the buffer
    start: Start = "first-set"
    share: Share = "none"
    steps: WhichSteps = "all"  # or those that say the answer, where requests went on past it
    union: int = 1  # rows that are one step, as with speculative decoding
    seed: int = 0  # of the random policy and of the nulls

    def __post_init__(self) -> None:
        from dsatrace.selection_replay.policies import POLICIES

        for name in self.policies:
            if name not in POLICIES:
                raise UserError(f"--policy {name}: use some of {', '.join(POLICIES)}")
        if not self.policies or not self.sizes:
            raise UserError("nothing to replay: name a --policy and a size in --sizes")
        if self.share != "none":
            for name in OWN_BUFFERS:
                if name in self.policies:
                    raise UserError(
                        f"--policy {name} with --share {self.share}: its buffers are per request and layer; "
                        "leave one out"
                    )
            if self.start == "first-b":
                raise UserError(
                    f"--start first-b with --share {self.share}: nothing says whose first ids a "
                    "shared buffer holds; leave one out"
                )
        if self.block is not None and self.block < 1:
            raise UserError(f"--unit block:{self.block}: a block has at least 1 token")
        if self.union < 1:
            raise UserError(f"--union {self.union}: use at least 1")
        if self.seed < 0:
            raise UserError(f"--seed {self.seed}: use 0 or more")

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "policies": list(self.policies), "sizes": self.size_labels}

    @property
    def size_labels(self) -> list[str]:
        return [size.label for size in self.sizes]

    @property
    def digest(self) -> str:
        """Names the results that these settings give."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def parse_unit(text: str) -> int | None:
    """`block:16` gives 16; `run` and the names of a run's own units give None."""
    if text in ("run", "token", "entry", "block", "expert"):
        return None
    name, _, tokens = text.partition(":")
    if name != "block" or not tokens.isdecimal():
        raise UserError(f"--unit {text}: use token or block:N, N tokens that are moved as one")
    return int(tokens)
