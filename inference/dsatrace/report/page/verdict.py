"""The page's head: what the run shows in one sentence, and before it what forbids to believe it.

Knows the manifest, the summary and the replay's figures; computes nothing that is not in them.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...trace.kind import inactive
from ..grid import Cell, number, percent
from ..replay_tables import past_answers
from ..tables import caveat, named_model, unit_text
from .material import Material, Record
from .section import figure_html, prose, told

KINDS = {
    "model": "measured",
    "random_weights": "measured, on random weights",
    "synthetic": "synthetic",
    "none": "no model ran",
}
"""How the selections were had, by the manifest's `selections`."""


def header(material: Material) -> str:
    warnings = "".join(f"<li>{prose(text)}</li>" for text in warnings_of(material))
    facts = "".join(
        f"<div><dt>{told(name)}</dt><dd>{figure_html(text)}</dd></div>" for name, text in facts_of(material)
    )
    return (
        f"<header>\n<h1>{told(material.run.folder.absolute().name)}</h1>\n"
        + (f'<ul class="warnings">{warnings}</ul>\n' if warnings else "")
        + f'<p class="verdict">{verdict_html(material)}</p>\n<dl class="facts">{facts}</dl>\n</header>'
    )


def verdict_html(material: Material) -> str:
    return "".join(
        f"<strong>{figure_html(part)}</strong>" if part.endswith("%") else figure_html(part)
        for part in verdict(material)
    )


def verdict(material: Material) -> list[str | Cell]:
    """Texts and numbers in turn: what a buffer misses; without a replay how alike two steps are."""
    summary, replay, size = material.summary, material.replay, material.size
    counts, overlap = summary["counts"], summary["step_overlap"]
    kind = KINDS[material.manifest["selections"]]
    model = "" if material.manifest["selections"] == "none" else f"{_model(material)} on "
    said: list[str | Cell] = [f"{kind[:1].upper()}{kind[1:]}: {model}{_data(material)}. "]
    of_these: list[str | Cell] = [
        "Of the ",
        *_top_k(material),
        f" {_unit(material)} that a step selects per layer, ",
    ]
    if not counts["records"]:
        said.append("No selection was recorded")
    elif not counts["sparse_records"]:
        said += ["All ", number(counts["records"], ","), " records are dense: no step saw more than top-k"]
    elif size is not None and replay is not None:
        if replay["settings"]["block"] is not None:
            of_these = [f"Of the {material.ids} that a step touches per layer, "]
        policies = replay["overall"]["policies"]
        lru, opt = _lru(material), policies.get("opt", {}).get(size)
        said += [*of_these, "an LRU buffer of ", number(lru["ids"], ",.0f")]
        shared = " for all layers" if replay["settings"]["share"] == "request" else ""
        said += [f" ({size})" if size[-1:] in "k%" else "", f"{shared} misses ", percent(lru["miss_rate"])]
        if opt is not None:
            said += ["; the best possible policy would miss ", percent(opt["miss_rate"])]
        if (uniform := lru["nulls"].get("uniform")) is not None:
            said += [", and LRU on random selections ", percent(uniform)]
    elif overlap["pairs"]:
        said += [
            *of_these,
            percent(overlap["mean"]),
            " were selected in the step before too, where chance gives ",
        ]
        said.append(percent(overlap["random_mean"]))
    else:
        said += [*of_these, "none can be compared with a step before"]
    steps, requests = counts["steps"], counts["requests"]
    said += [" (", number(steps, ",", _plural(steps, " decode step")), " of "]
    return [*said, number(requests, ",", _plural(requests, " request")), f", by door {material.kind.door})."]


def _plural(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _unit(material: Material) -> str:
    """The run's own ids, in the plural."""
    if material.kind.id_kind == "slot":
        return "slots"
    return "entries" if material.kind.unit == "entry" else f"{material.kind.unit}s"


def facts_of(material: Material) -> Iterator[tuple[str, str]]:
    """What the numbers stand on."""
    counts, kind, manifest = material.summary["counts"], material.kind, material.manifest
    yield "selections", KINDS[manifest["selections"]]
    yield "records", number(counts["records"], ",")
    yield "unit", unit_text(kind)
    if kind.id_kind == "slot":
        yield "ids", "slots"
    if counts["records"]:
        yield "k", _range(sorted({layer.top_k for layer in kind.layers if layer.heads}))
    if material.replay is not None and (context := material.replay["overall"]["contexts"]["p100"]):
        yield "context, at most", number(context, ",", f" {material.ids}")
    if material.size is not None and (num_bytes := _lru(material)["bytes_per_token"]) is not None:
        yield f"fetched per new token at {material.size}", Cell(f"{num_bytes / 2**20:,.2f} MiB", num_bytes)
    yield "door", kind.door
    if manifest.get("tiers"):
        pools = (manifest["tiers"].get(name) for name in ("local_pool", "remote_pool"))
        ways = sorted({pool["latency_kind"] for pool in pools if pool})
        yield "fetch times", " and ".join(ways)
    if material.replay is not None:
        yield "misses", "replayed from the selections"


def _lru(material: Material) -> Record:
    assert material.replay is not None and material.size is not None, "only a replay has a size"
    found: Record = material.replay["overall"]["policies"]["lru"][material.size]
    return found


def warnings_of(material: Material) -> Iterator[str]:
    """Most grave first."""
    summary, manifest, kind = material.summary, material.manifest, material.kind
    counts = summary["counts"]
    if warning := caveat(summary):
        yield warning
    stored = (manifest.get("selection") or {}).get("sparse_active", summary.get("sparse_active"))
    if warning := inactive(counts["sparse_records"], stored):
        yield warning
    if not counts["records"]:
        yield "No step was recorded: there are no selections to show."
    elif not counts["sparse_records"]:
        yield "No step saw more than top-k: everything was selected, and there is nothing sparse to show."
    if kind.id_kind == "slot":
        yield "Ids are an engine's slots: they tell no positions, and what needs positions is not shown."
    if summary["dropped_steps"]:
        yield f"{summary['dropped_steps']:,} steps were dropped while tracing: their selections are missing."
    if material.replay is not None and material.replay["settings"]["steps"] == "all":
        yield from past_answers(material.replay)
    rate = manifest["trace"]["sample_rate"]
    if rate < 1 and counts["records"]:
        yield f"Only a share of {rate:g} of the steps was recorded: the step before is often not there."
    if material.run.state != "complete":
        yield f"The run is {material.run.state}: it shows what was recorded so far."
    if kind.missing:
        yield f"Door {kind.door} does not tell: {', '.join(kind.missing)}."


def _model(material: Material) -> str:
    layers = sum(layer.heads > 0 for layer in material.kind.layers)
    of = f" ({layers} selecting {_plural(layers, 'layer')})" if material.summary["counts"]["records"] else ""
    return f"{named_model(material.manifest) or 'a model'}{of}"


def _data(material: Material) -> str:
    workload = (material.summary.get("workload") or {}).get("name")
    source = material.manifest.get("data_source")
    if workload:
        return f"{workload} ({source})" if source else f"{workload}"
    return f"{source}" if source else "the user's own prompts"


def _top_k(material: Material) -> list[str | Cell]:
    sizes = sorted({layer.top_k for layer in material.kind.layers if layer.heads})
    if len(sizes) == 1:
        return [number(sizes[0], ",")]
    return [number(sizes[0], ","), " to ", number(sizes[-1], ",")] if sizes else []


def _range(sizes: list[int]) -> str:
    if len(sizes) == 1:
        return number(sizes[0], ",")
    return f"{sizes[0]:,} to {sizes[-1]:,}" if sizes else "-"
