"""What the buffer's misses cost on a link, and from which batch it pays: modelled, with the page's sliders.

The figures are those of `selection_replay.cost`, at the replay's own link or the usual one. `cost.js` has the
same formulas: as the page opens it gives the very numbers that stand here.

    section = cost_and_crossover(material)
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ...errors import UserError
from ...selection_replay.cost import BATCHES, CONTEXTS, LINKS, MOST_REQUESTS, Cost
from ...text import plain
from ...units import size_text
from ..grid import Cell, number
from .material import Material
from .section import LeftOut, Row, Section, Table, table_html, told
from .svg import Axis, Series, line_chart

TITLE = "What do the misses cost, and from which batch does a buffer pay?"
BY_BATCH = ("batch", "all in HBM, ms", "buffers, overlapped, ms", "buffers, serial, ms")
BY_CONTEXT = (
    "context (tokens)", "most requests, all in HBM", "most requests, buffers", "tokens/s, all in HBM",
    "tokens/s, buffers", "pays from batch",
)  # fmt: skip
CURVES = ("all in HBM", "buffers, overlapped", "buffers, serial")
DEFAULT_CONTEXT = 32768


class Slider(NamedTuple):
    """A number that the reader may change; `low` to `high` on a log scale where `low` is above 0."""

    key: str
    label: str
    value: float
    low: float
    high: float


def cost_and_crossover(material: Material) -> Section | LeftOut:
    if material.replay is None:
        return LeftOut(TITLE, f"it needs a replay; {material.no_replay}")
    try:
        cost, hbm_bytes = Cost.stored(material.replay)
    except UserError as error:
        return LeftOut(TITLE, plain(f"{error}".removeprefix("--link: ")))
    record = cost.to_json(hbm_bytes)
    was_asked = bool((material.replay.get("chosen") or {}).get("cost"))
    sliders = _sliders(cost, hbm_bytes)
    said = _said(cost, record)
    batches, contexts = _by_batch(record), _by_context(record)
    link = f"{plain(cost.link.name)} ({plain(cost.link.what)})"
    facts = told(json.dumps(_facts(cost, sliders)), None)
    tables = table_html((BY_BATCH, batches), "Modelled time of a decode step", "cost-batches")
    tables += table_html((BY_CONTEXT, contexts), "Modelled throughput where HBM is full", "cost-contexts")
    body = (
        f'<p class="answer" data-cost="said">{told(said)}</p>'
        f'<div class="cost" data-cost-facts="{facts}">{_controls(cost.link.name, sliders)}'
        f"{_chart(cost, hbm_bytes)}{tables}</div>"
    )
    return Section(
        "cost", TITLE, body, _note(cost, link, was_asked), _command(material, cost, hbm_bytes), _figures(cost)
    )


def _sliders(cost: Cost, hbm_bytes: float) -> Sequence[Slider]:
    link = cost.link
    return (
        Slider("bandwidth", "link bandwidth, GB/s", link.read_gb_per_s.value, 0.5, 5000),
        Slider("alpha", "latency per batch of reads, us", link.alpha_batch_us.value, 0, 200),
        Slider("op", "latency per read, us", link.alpha_op_us.value, 0, 20),
        Slider("base", "compute of a layer's step, us", cost.compute.base, 1, 5000),
        Slider("perRequest", "and per request, us", cost.compute.per_request, 0, 100),
        Slider("hbm", "HBM for KV, GiB", hbm_bytes / 2**30, 0.1, 2000),
        Slider("batch", "batch, requests", 16, 1, 1024),
        Slider("context", "context, tokens", DEFAULT_CONTEXT, 1024, 1 << 20),
    )


def _facts(cost: Cost, sliders: Sequence[Slider]) -> dict[str, Any]:
    """What the script computes from."""
    return {
        "misses": cost.misses, "size": cost.size, "bytesPerId": cost.bytes_per_id,
        "indexBytesPerId": cost.index_bytes_per_id, "tokensPerId": cost.tokens_per_id,
        "batches": BATCHES, "contexts": CONTEXTS, "mostRequests": MOST_REQUESTS,
        "defaults": {slider.key: slider.value for slider in sliders},
        "links": {name: _figures_of(name) for name in LINKS},
    }  # fmt: skip


def _figures_of(name: str) -> dict[str, float]:
    link = LINKS[name]
    return {
        "bandwidth": link.read_gb_per_s.value,
        "alpha": link.alpha_batch_us.value,
        "op": link.alpha_op_us.value,
    }


def _controls(link: str, sliders: Sequence[Slider]) -> str:
    names = "".join(
        f"<option{' selected' if name == link else ''}>{told(name)}</option>"
        for name in {link: 0} | dict(LINKS)
    )
    rows = [
        f'<div class="slider"><label for="cost-link">link: sets the three below it</label>'
        f'<select id="cost-link">{names}</select></div>'
    ]
    for slider in sliders:
        name = f"cost-{slider.key}"
        step = "1" if slider.key in ("batch", "context") else "any"
        rows.append(
            f'<div class="slider"><label for="{name}">{told(slider.label)}</label>'
            f'<input type="range" min="0" max="1000" data-key="{slider.key}" data-low="{slider.low:g}" '
            f'data-high="{slider.high:g}" aria-label="{told(slider.label)}">'
            f'<input type="number" id="{name}" data-key="{slider.key}" value="{slider.value:g}" min="0" '
            f'step="{step}"></div>'
        )
    return (
        '<fieldset class="controls"><legend>Try other figures; everything below follows</legend>'
        + "".join(rows)
        + '<button type="button" class="reset">Back to the replay\'s figures</button></fieldset>'
    )


def _said(cost: Cost, record: dict[str, Any]) -> str:
    """As `cost.js` says it."""
    batch, context = 16, DEFAULT_CONTEXT
    row = next(row for row in record["by_batch"] if row["batch"] == batch)
    at = next(row for row in record["by_context"] if row["context"] == context)
    pays = at["pays_from_batch"]
    return (
        f"Modelled: at batch {batch:,} a step takes {row['overlapped_ms']:,.2f} ms with buffers, fetch and "
        f"compute overlapped ({row['serial_ms']:,.2f} ms one after the other), and {row['whole_ms']:,.2f} ms "
        f"with everything in HBM. At {context:,} tokens of context {at['most_requests']:,} requests fit "
        f"without buffers and {at['most_requests_offloaded']:,} with; "
        + (
            f"buffers pay from batch {pays:,}."
            if pays is not None
            else "buffers do not pay at any batch that fits."
        )
    )


def _by_batch(record: dict[str, Any]) -> list[Row]:
    keys = ("whole_ms", "overlapped_ms", "serial_ms")
    return [(number(row["batch"]), *(number(row[key], ",.2f") for key in keys)) for row in record["by_batch"]]


def _by_context(record: dict[str, Any]) -> list[Row]:
    return [
        (
            number(row["context"], ","),
            number(row["most_requests"], ","),
            number(row["most_requests_offloaded"], ","),
            number(row["tokens_per_s"], ",.0f"),
            number(row["tokens_per_s_offloaded"], ",.0f"),
            number(row["pays_from_batch"], ",", none="never"),
        )
        for row in record["by_context"]
    ]


def curves(cost: Cost, context: int, hbm_bytes: float) -> list[tuple[list[int], list[float]]]:
    """Tokens per second by batch up to what fits, in the order of `CURVES`."""
    serial: Callable[[int], float] = functools.partial(cost.step_us, overlapped=False)
    steps: tuple[Callable[[int], float], ...] = (cost.whole_step_us, cost.step_us, serial)
    found = []
    for i, step_us in enumerate(steps):
        most = min(cost.most_requests(context, hbm_bytes, offloaded=i > 0), MOST_REQUESTS)
        batches = [1 << bits for bits in range(most.bit_length()) if 1 << bits < most] + (
            [most] if most else []
        )
        found.append((batches, [batch / step_us(batch) * 1e6 for batch in batches]))
    return found


def _chart(cost: Cost, hbm_bytes: float) -> str:
    found = curves(cost, DEFAULT_CONTEXT, hbm_bytes)
    rates = [rate for _, ys in found for rate in ys] or [1.0]
    series = [
        Series(name, xs, ys, style, marked=True)
        for style, (name, (xs, ys)) in enumerate(zip(CURVES, found, strict=True))
    ]
    largest = max([batches[-1] for batches, _ in found if batches], default=2)
    chart = line_chart(
        "Modelled tokens per second by batch",
        "Each curve ends where HBM is full; the tables below say the same.",
        Axis("batch (requests)", 1, max(largest, 2), log=True),
        Axis("tokens per second", min(rates), max(rates) * 1.05, log=True), series,
    )  # fmt: skip
    return f'<div data-cost="chart">{chart}</div>'


def _figures(cost: Cost) -> Table:
    """What the replay gave, and the link's figures with their sources."""
    link = cost.link
    rows: list[Row] = [
        ("ids of a buffer, per layer and request", number(cost.size, ",g"), "replay"),
        ("missed ids of a step, summed over layers", number(sum(cost.misses), ",.1f"), "replay, mean"),
        ("bytes of an id, in one layer", number(cost.bytes_per_id, ","), "cache layout"),
        (
            "bytes of its indexer key, which stays in HBM",
            number(cost.index_bytes_per_id, ","),
            "cache layout",
        ),
    ]
    for name, figure in (
        ("alpha per batch of reads, us", link.alpha_batch_us),
        ("o per read, us", link.alpha_op_us),
        ("bandwidth, GB/s", link.read_gb_per_s),
    ):
        rows.append((name, Cell(f"{figure.value:g}", figure.value), f"{figure.source} ({figure.confidence})"))
    return ("figure", "value", "from"), rows


def _note(cost: Cost, link: str, was_asked: bool) -> str:
    alphas = (cost.link.alpha_batch_us, cost.link.alpha_op_us)
    unknown = any(figure.confidence == "unknown" for figure in alphas)
    lower = (
        "; a latency of it that nobody has published stands at 0, so times are lower bounds"
        if unknown
        else ""
    )
    compute = f"{cost.compute.base:g} + batch x {cost.compute.per_request:g} us"
    whose = "as the replay was told" if was_asked else "assumed, not measured: set it to your device's"
    return (
        "Modelled, never measured. A layer's step takes max(compute, alpha + operations x o + bytes / "
        "bandwidth), or their sum where they do not overlap; every layer at its mean misses of LRU at "
        f"{cost.size:,.0f} ids ({size_text(cost.size * cost.bytes_per_id)} per layer and request), an "
        f"operation is one id. Link: {link}{lower}. Compute of a layer's step: {compute} ({whose})."
    )


def _command(material: Material, cost: Cost, hbm_bytes: float) -> str:
    chosen = (material.replay or {}).get("chosen") or {}
    size, compute = chosen.get("size"), cost.compute
    return material.command(
        "replay", *(("--choose", size) if size else ()), "--link", cost.link.name,
        "--compute-us", f"{compute.base:g}+{compute.per_request:g}", "--hbm-gb", f"{hbm_bytes / 1e9}",
    )  # fmt: skip
