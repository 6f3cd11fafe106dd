"""What others have published of overlaps and miss rates, once, as data: the tables of docs/published.md and
the markers in our pictures.

Of none of these figures have the selections been released, so none can be computed again.

    python -m dsatrace.report.published     # prints the tables of the page
    miss_rates(buffer_k=2.0)                # the figures at B = 2k
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

Measure = Literal["miss_rate", "step_overlap", "layer_overlap"]
"""Missed of selected ids; the share of a selection that the step before had; that the layer before had."""

Seen = Literal["second-hand", "issue", "document"]
"""How we know it: from notes on a paper that we did not open, or read in an issue or a document."""

POLICIES = ("lru", "fifo", "random", "opt")
"""Which id leaves the buffer; opt is the best possible choice (Belady's)."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What was measured, as far as the source tells."""

    source: str
    seen: Seen
    model: str
    data: str | None
    unit: str  # that an id stands for
    top_k: int | None  # ids in a selection


@dataclasses.dataclass(frozen=True)
class Figure:
    """A share of selected ids, from `low` to `high`; equal where the source gives one number."""

    of: Setting
    measure: Measure
    low: float
    high: float
    buffer_k: float | None = None  # of a miss rate: ids that the buffer holds, in units of top-k
    policy: str | None = None  # of a miss rate: one of POLICIES
    about: bool = False  # the source says "about"
    note: str = ""

    @property
    def missed_at_k(self) -> tuple[float, float] | None:
        """Lowest and highest miss rate at B = k; None where the figure does not tell it.

        A buffer of k ids holds the last selection and nothing else, under any policy that fills it on
        demand: it misses what that selection does not have.
        """
        if self.measure == "step_overlap":
            return 1 - self.high, 1 - self.low
        return (self.low, self.high) if self.measure == "miss_rate" and self.buffer_k == 1 else None


_HISPARSE = Setting("HiSparse, arXiv 2608.07009", "second-hand", "GLM-5.1", "LongBench v2", "token", 2048)
_GVR = Setting("GVR, arXiv 2604.22312", "second-hand", "DeepSeek-V3.2", None, "token", 2048)
_ESS = Setting("ESS, arXiv 2512.10576", "second-hand", "not in our notes", "32K tokens", "token", 2048)
_SHADOWKV = Setting("ByteDance-Seed/ShadowKV#3", "issue", "Llama type", None, "chunk", None)
_ASCEND = Setting("vllm-ascend#9390, fork's PR #134", "issue", "with DSA", None, "not told", None)
_BINGPS = Setting(
    "bingps/sglang-fork, dsv4f-topk/README.md",
    "document",
    "DeepSeek-V4-Flash, C4 layers",
    "LongBench v2, first 100",
    "compressed entry",
    512,
)
_INDEX_CACHE = Setting(
    "IndexCache, arXiv 2603.12201", "second-hand", "not in our notes", None, "not told", None
)
_HITS = "told as hits; the newest id always hits; the policy is not in our notes (HiSparse's is LRU)"


def _missed(of: Setting, buffer_k: float, policy: str, rate: float, note: str = "") -> Figure:
    return Figure(of, "miss_rate", rate, rate, buffer_k, policy, note=note)


FIGURES = (
    _missed(_HISPARSE, 1, "lru", 0.300),
    _missed(_HISPARSE, 2, "lru", 0.134, "B = 4,096, the engines' default"),
    _missed(_HISPARSE, 2, "fifo", 0.172),
    _missed(_HISPARSE, 2, "random", 0.161),
    _missed(_HISPARSE, 2, "opt", 0.082),
    _missed(_HISPARSE, 4, "lru", 0.067),
    Figure(_GVR, "step_overlap", 0.35, 0.50, note="layers 20 to 60"),
    Figure(_GVR, "step_overlap", 0.015, 0.015, about=True, note="layers 0 and 1; chance 2.9 %"),
    Figure(_SHADOWKV, "step_overlap", 0.60, 0.60, about=True, note="chunks of tokens, chosen top-k"),
    Figure(_ASCEND, "step_overlap", 0.95, 1.0, note="at least 95 %"),
    Figure(
        *(_ESS, "miss_rate", 16.66 / 2048, 605 / 2048, 6400 / 2048, "lru"),
        about=True,
        note="16.66 to 605 of 2,048 ids missed; B about 6.4K, a fifth of the context; warmed by the "
        "prompt's last 32 windows; MTP 1",
    ),
    *(
        _missed(_BINGPS, entries / 512, "lru", round(1 - hits, 3), _HITS)
        for entries, hits in (
            *((1024, 0.793), (2048, 0.883), (4096, 0.925)),
            *((8192, 0.948), (16384, 0.972), (32768, 1.0)),
        )
    ),
    Figure(_BINGPS, "layer_overlap", 0.349, 0.349, note="chance 5.0 %; Jaccard 21.7 %"),
    Figure(
        _INDEX_CACHE,
        "layer_overlap",
        0.70,
        1.0,
        note="bingps finds that it does not hold for V4",
    ),
)


def miss_rates(buffer_k: float, policy: str | None = None) -> list[Figure]:
    """The published miss rates of buffers of that size, of one policy or of all."""
    return [
        figure
        for figure in FIGURES
        if figure.buffer_k == buffer_k and (policy is None or figure.policy == policy)
    ]


def lru_points() -> dict[str, list[Figure]]:
    """By model, the published miss rates of LRU that are one number, by size."""
    points: dict[str, list[Figure]] = {}
    for figure in sorted(FIGURES, key=lambda figure: figure.buffer_k or 0):
        if figure.policy == "lru" and figure.buffer_k is not None and figure.low == figure.high:
            points.setdefault(figure.of.model.partition(",")[0], []).append(figure)
    return points


def share_text(low: float, high: float, about: bool = False) -> str:
    """`30.0 %`, `35.0 to 50.0 %`, `about 60.0 %`."""
    value = f"{100 * low:.1f}" if low == high else f"{100 * low:.1f} to {100 * high:.1f}"
    return f"{'about ' if about else ''}{value} %"


def published_markdown() -> str:
    """The tables of docs/published.md."""
    return "\n\n".join((_at_k(), _by_policy(), _by_size(), _between_layers()))


_SETTING = ("source", "seen", "model", "data", "unit", "k")


def _setting(setting: Setting) -> tuple[str, ...]:
    top_k = "not told" if setting.top_k is None else f"{setting.top_k:,}"
    return (setting.source, setting.seen, setting.model, setting.data or "not told", setting.unit, top_k)


def _at_k() -> str:
    rows = []
    for figure in FIGURES:
        if (missed := figure.missed_at_k) is None:
            continue
        overlap = (1 - missed[1], 1 - missed[0])
        shares = [share_text(*overlap, figure.about), share_text(*missed, figure.about)]
        told = 0 if figure.measure == "step_overlap" else 1
        shares[told] = f"**{shares[told]}**"
        rows.append((*_setting(figure.of), *shares, figure.note))
    head = (*_SETTING, "step overlap", "missed at B = k", "note")
    return _table("At B = k: what is published (bold), and what follows from it", head, rows)


def _by_policy() -> str:
    def missed(size: float, policy: str) -> str:
        told = (figure for figure in miss_rates(size, policy) if figure.of is _HISPARSE)
        return next((share_text(figure.low, figure.high) for figure in told), "not told")

    rows = [(_buffer(size), *(missed(size, policy) for policy in POLICIES)) for size in (1.0, 2.0, 4.0)]
    head = ("B", *(policy.upper() if policy != "random" else policy for policy in POLICIES))
    return _table(f"Missed by policy: {_HISPARSE.source}, {_HISPARSE.model}, {_HISPARSE.data}", head, rows)


def _by_size() -> str:
    others = [f for f in FIGURES if f.measure == "miss_rate" and f.of is not _HISPARSE]
    rows = [
        (
            *_setting(figure.of),
            _buffer(figure.buffer_k or 0.0, figure.about),
            share_text(figure.low, figure.high),
            figure.note,
        )
        for figure in others
    ]
    return _table("Missed by larger buffers, LRU", (*_SETTING, "B", "missed", "note"), rows)


def _between_layers() -> str:
    rows = [
        (*_setting(figure.of), share_text(figure.low, figure.high), figure.note)
        for figure in FIGURES
        if figure.measure == "layer_overlap"
    ]
    return _table("Overlap of adjacent layers", (*_SETTING, "overlap", "note"), rows)


def _buffer(size: float, about: bool = False) -> str:
    if size == 1:
        return "k"
    return f"about {size:.1f} k" if about else f"{size:g} k"


def _table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"### {title}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return "\n".join((*lines, *(f"| {' | '.join(row)} |" for row in rows)))


if __name__ == "__main__":
    print(published_markdown())
