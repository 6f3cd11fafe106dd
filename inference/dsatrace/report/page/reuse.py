"""How soon an id is selected again, whether selections stay, and how many ids a stretch of steps needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..grid import Cell, number, percent
from ..replay_tables import NULL_TITLES
from .material import Material, Record
from .miss_curve import rate
from .section import LeftOut, Row, Section, Table, figures_html
from .svg import Axis, Bar, Series, bars, known_points, line_chart

REUSE = "How soon is an id selected again?"
STAYS = "Does a selection stay, or move along?"
WORKING_SET = "How many ids does a stretch of steps need?"


def reuse(material: Material) -> Section | LeftOut:
    record = material.replay
    if record is None:
        return LeftOut(REUSE, material.no_replay)
    overall = record["overall"]
    found, selected = overall["reuse"], overall["selected"]
    never, distances = found["never_selected_before"], found["distances"]
    if never is None:
        return LeftOut(REUSE, "no selected id counts")
    octaves = _octaves(distances["values"], distances["counts"])
    total = sum(distances["counts"]) / (1 - never) if never < 1 else selected
    body = figures_html(_answer(found["steps_since_selected"], never)) + bars(
        REUSE,
        f"Selected ids by the steps since they were last selected; {never:.1%} never were.",
        "steps since it was last selected",
        Axis(f"share of the selected {material.ids}", 0, 1, share=True),
        [*(Bar(name, count / total) for name, count in octaves), Bar("never", never)],
        ("share",),
    )
    rows: list[Row] = [(name, rate(count / total), number(count, ",")) for name, count in octaves]
    rows.append(("never", rate(never), ""))
    note = (
        "Of every selected id, the steps since the same layer and request selected it last; 1 is the step "
        f"before. Over {selected:,} selected {material.ids}. Never: not since the recording began."
    )
    return Section("reuse", REUSE, body, note, material.replay_command, (("steps", "share", "ids"), rows))


def step_overlap(material: Material) -> Section | LeftOut:
    record = material.replay
    if record is None:
        return LeftOut(STAYS, material.no_replay)
    streams = record["overall"]["overlap"]
    run = streams["run"]
    lags = run["lags"]
    named = {
        "still selected": run["share"],
        "the same, moved along with the query": run["shifted_share"],
        "chance (k / N)": run["chance"],
        **{title: streams[null]["share"] for null, title in NULL_TITLES.items() if null in streams},
    }
    nulls = list(named)[2:]
    series = [
        Series(name, *known_points(lags, shares), style, null=name in nulls, marked=name not in nulls)
        for style, (name, shares) in enumerate(named.items())
        if shares is not None and any(share is not None for share in shares)
    ]
    if not series:
        return LeftOut(STAYS, "no request has two steps that count")
    shown = [lag for one in series for lag in one.xs]
    body = line_chart(
        STAYS,
        "Share of a selection that an earlier step had too, by the steps between them.",
        Axis("steps back", min(shown), max(shown), log=True, ticks=lags),
        Axis(f"share of the selected {material.ids}", 0, 1, share=True),
        series,
    )
    note = (
        "Share of a selection that the same layer selected so many steps earlier. Moved along: at the same "
        "distances from the query, as a window has it. Grey: chance, and sets of the same sizes but of other "
        "ids."
    )
    return Section(
        "stays", STAYS, body, note, material.replay_command, _by_x("steps back", lags, series, rate)
    )


def working_set(material: Material) -> Section | LeftOut:
    record = material.replay
    if record is None:
        return LeftOut(WORKING_SET, material.no_replay)
    titles = {"run": "the run"} | NULL_TITLES
    streams: Record = record["overall"]["working_set"]
    stretches = streams["run"]["steps"]
    series = [
        Series(titles[name], *known_points(found["steps"], found["mean_ids"]), 0 if name == "run" else style,
               null=name != "run", marked=name == "run")
        for style, (name, found) in enumerate(streams.items(), 2)
        if any(ids is not None for ids in found["mean_ids"])
    ]  # fmt: skip
    if not series:
        return LeftOut(WORKING_SET, "no request has as many steps as the shortest stretch")
    xs, ys = [x for one in series for x in one.xs], [y for one in series for y in one.ys]
    body = line_chart(
        WORKING_SET,
        "Distinct ids that a layer selects in consecutive steps, by their number.",
        Axis("consecutive steps", min(xs), max(xs), log=True, ticks=stretches),
        Axis(f"distinct {material.ids} (mean)", 0, max(ys), nice=True),
        series,
    )
    note = (
        f"Distinct {material.ids} that a layer selects in so many consecutive steps, mean over stretches, "
        "layers and requests. A buffer that holds as many misses little but first reads."
    )
    table = _by_x("steps", stretches, series, lambda ids: "" if ids is None else number(ids, ",.1f"))
    return Section("working-set", WORKING_SET, body, note, material.replay_command, table)


def _by_x(
    title: str, xs: Sequence[float], series: Sequence[Series], shown: Callable[[float | None], str]
) -> Table:
    """The lines as a table: a row per x, a column per line."""
    points = [dict(zip(one.xs, one.ys, strict=True)) for one in series]
    rows = [(f"{x}", *(shown(of.get(x)) for of in points)) for x in xs]
    return [title, *(one.name for one in series)], rows


def _octaves(values: Sequence[int], counts: Sequence[int]) -> list[tuple[str, int]]:
    """Distances 1, 2, 3-4, 5-8, ...: a name and the ids in each."""
    sums: dict[int, int] = {}
    for value, count in zip(values, counts, strict=True):
        octave = (value - 1).bit_length()
        sums[octave] = sums.get(octave, 0) + count
    names = []
    for octave in range(max(sums, default=-1) + 1):
        low, high = (1 << octave - 1) + 1 if octave else 1, 1 << octave
        names.append((f"{low}" if low == high else f"{low}-{high}", sums.get(octave, 0)))
    return names


def _answer(quantiles: Record, never: float) -> list[str | Cell]:
    if quantiles["p50"] is None:
        return ["No id was selected twice."]
    return [
        "Of the ids that are selected again, half come back within ",
        _steps(quantiles["p50"]),
        " and 95% within ",
        _steps(quantiles["p95"]),
        "; ",
        percent(never),
        " of the selected ids were never selected before.",
    ]


def _steps(count: int) -> Cell:
    return number(count, ",", " step" if count == 1 else " steps")
