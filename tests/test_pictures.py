"""Every panel of every kind of run: no empty frame, no axis without extent, no label cut or covered."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsatrace import cli
from dsatrace.report.figure import PANELS, draw
from dsatrace.report.panels import STYLES, PictureSettings, draw_panel, left_out, style_rc
from dsatrace.report.replay_figure import PANELS as REPLAY_PANELS
from dsatrace.report.replay_figure import draw_replay
from dsatrace.report.run_subject import RunSubject
from dsatrace.selection_replay.figures import figures
from dsatrace.selection_replay.replay import replay_all
from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
from dsatrace.selection_replay.work import find_work
from dsatrace.trace.reader import RunReader
from helpers.command_runs import told_error
from helpers.golden_run import SERVING, GoldenRequest, write_golden
from helpers.kind_runs import write_kind
from helpers.tier_samples import SETUPS
from test_trace_requests import serve_without_steps


def _empty(folder: Path) -> None:
    serve_without_steps(folder)


def _random_weights(folder: Path) -> None:
    write_golden(folder, serving=SERVING)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"selections": "random_weights"}))


def _golden(*requests: GoldenRequest, **options: Any) -> Callable[[Path], object]:
    return lambda folder: write_golden(folder, requests, **options)


_NEEDLE = tuple(range(11, 31))
RUNS: dict[str, Callable[[Path], object]] = {
    "empty": _empty,
    "one step": _golden(GoldenRequest("r0", 40, 2, needle_positions=_NEEDLE)),
    "one layer": _golden(GoldenRequest("r0", 40, 6), GoldenRequest("r1", 33, 6), num_layers=1),
    "dense": _golden(GoldenRequest("r0", 2, 4), GoldenRequest("r1", 3, 5)),
    "random weights": _random_weights,
    "slots": lambda folder: write_kind(folder, "slots"),
    "128K": _golden(GoldenRequest("r0" * 30, 131_072, 6, needle_positions=_NEEDLE), block_size=16),
    "tiers": lambda folder: write_golden(folder, tiers=SETUPS["block"], serving=SERVING),
    "200 requests": _golden(*(GoldenRequest(f"r{i}", 20 + i % 30, 3) for i in range(200)), serving=SERVING),
    "61 layers": _golden(GoldenRequest("r0", 40, 4), GoldenRequest("r1", 44, 4), num_layers=61),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of that name, written when it is first asked for."""
    root = tmp_path_factory.mktemp("pictures")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            RUNS[name](root / name)
        return root / name

    return folder


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Looks at each figure before it is saved; holds the titles of all that were drawn."""
    titles: list[str] = []
    real = Figure.savefig

    def savefig(figure: Figure, path: Path, **options: Any) -> None:
        titles.extend(_look_at(figure))
        if path.suffix != ".png":  # which would only draw it again
            real(figure, path, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    yield titles


def _look_at(figure: Figure) -> list[str]:
    """Titles of its panels. Fails for what nobody should publish."""
    figure.canvas.draw()
    places = [place for place in figure.subfigs if place.axes] or [figure]
    texts = [part for place in places for part in _texts(place)]
    if places != [figure]:
        texts += [(_suptitle(figure), _box(figure, figure._suptitle))] if figure._suptitle else []
    for name, box in texts:
        assert box.x0 >= -0.5 and box.y0 >= -0.5, f"{name!r} is cut"
        assert box.x1 <= figure.bbox.x1 + 0.5 and box.y1 <= figure.bbox.y1 + 0.5, f"{name!r} is cut"
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        across, along = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert across <= 1 or along <= 1, f"{one!r} covers {other!r}"
    for axes in (axes for place in places for axes in place.axes):
        _look_at_axes(axes)
    pixels = np.asarray(figure.canvas.buffer_rgba())
    seen = [_pixels(pixels, place.axes[0].bbox) for place in places]
    assert len(set(seen)) == len(seen), "two panels are the same"
    return [_suptitle(place).replace("\N{NO-BREAK SPACE}", " ") for place in places]


def _suptitle(place: Any) -> str:
    return place._suptitle.get_text() if place._suptitle else ""


def _box(place: Any, artist: Any) -> Any:
    return artist.get_window_extent(place.figure.canvas.get_renderer())


def _pixels(pixels: np.ndarray, box: Any) -> str:
    height = len(pixels)
    part = pixels[height - int(box.y1) : height - int(box.y0), int(box.x0) : int(box.x1)]
    return hashlib.sha256(np.ascontiguousarray(part)).hexdigest()


def _texts(place: Any) -> Iterator[tuple[str, Any]]:
    """All that is written in a panel, and where."""
    if place._suptitle and place._suptitle.get_text():
        yield _suptitle(place), _box(place, place._suptitle)
    for legend in place.legends:
        yield "the legend", _box(place, legend)
        for axes in place.axes:
            data = axes.bbox
            assert not legend.get_window_extent().overlaps(data), "the legend covers data"
    for axes in place.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if axis.label.get_text():
                yield axis.label.get_text(), _box(place, axis.label)
            yield from ((label.get_text(), _box(place, label)) for label in _tick_labels(axis))
        yield from ((text.get_text(), _box(place, text)) for text in axes.texts if text.get_text())


def _tick_labels(axis: Any) -> list[Any]:
    """Those that are drawn."""
    ticks = [tick for tick in axis._update_ticks() if tick.label1.get_visible() or tick.label2.get_visible()]
    labels = [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in ticks]
    return [label for label in labels if label.get_text()]


COUNTED = ("layer", "other layer", "decode step of the request", "counted decode step", "steps back")


def _look_at_axes(axes: Any) -> None:
    assert axes.lines or axes.patches or axes.images or axes.collections, "an empty frame"
    is_colour_bar = axes.get_label() == "<colorbar>"
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        assert np.isfinite([low, high]).all() and high > low
        labels = [label.get_text() for label in _tick_labels(axis)]
        if is_colour_bar and axis is axes.xaxis:
            continue
        assert labels and len(set(labels)) == len(labels), labels
        assert not any(label.startswith(("-", "\N{MINUS SIGN}")) for label in labels), labels
        is_share = any("%" in label for label in labels)
        assert not is_share or (low, high) == (0, 1), "a share is from 0 to 1"
        what = axis.label.get_text()
        assert what or is_colour_bar or axis is axes.yaxis, "an axis without a name"
        if what in COUNTED or what.startswith("block of"):
            assert not any("." in label for label in labels), labels


@pytest.mark.parametrize("name", RUNS)
def test_every_panel_of_a_run(folder_of: Callable[[str], Path], sound: list[str], name: str) -> None:
    run = RunReader(folder_of(name))
    drawn = draw(run)
    assert len(drawn.paths) == (name != "dense")
    assert len(sound) + len(drawn.left_out) == len(PANELS)
    titles = [title.splitlines()[0] for title in sound]
    assert titles == [panel.title for key, panel in PANELS.items() if key not in drawn.left_out]
    model = "no model" if name == "empty" else f"(config {run.manifest['model_config_digest'][:8]})"
    for title in sound:
        assert model in title and "request" in title, title
        is_served = "arrival" in title or "over time" in title
        assert is_served or all(word in title for word in ("layer", "unit: ", "step")), title


def test_what_is_left_out_and_why(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["report", str(folder_of("dense"))]) == 0
    said = capsys.readouterr().out
    assert "no panel blocks, map, overlap, offsets: no step saw more than top-k" in said
    assert "no panel found, moved: HBM held everything" in said
    assert "picture:" not in said
    assert left_out(PANELS, RunSubject(RunReader(folder_of("slots"))))["map"] == "its ids are no positions"
    assert list(left_out(PANELS, RunSubject(RunReader(folder_of("tiers"))))) == []


@pytest.fixture(scope="module")
def replayed(folder_of: Callable[[str], Path]) -> Callable[..., dict[str, Any]]:
    """The record of a run's replay."""

    def record(name: str, **settings: Any) -> dict[str, Any]:
        chosen = ReplaySettings(policies=("lru", "fifo", "opt"), sizes=parse_sizes("1k,2k"), **settings)
        result = replay_all(find_work([folder_of(name)], chosen), chosen)
        return {**result.header, **figures(result)}

    return record


REPLAYS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "one step": ("one step", {"start": "empty"}, {"reuse", "lags"}),
    "one layer": ("one layer", {}, {"between"}),
    "slots": ("slots", {}, set()),
    "pooled": ("tiers", {"share": "request"}, {"misses", "layers"}),
    "61 layers": ("61 layers", {}, set()),
}


@pytest.mark.parametrize("name", REPLAYS)
def test_every_panel_of_a_replay(
    replayed: Callable[..., dict[str, Any]], sound: list[str], tmp_path: Path, name: str
) -> None:
    run, settings, missing = REPLAYS[name]
    record = replayed(run, **settings)
    drawn = draw_replay(record, tmp_path / "replay")
    assert set(drawn.left_out) == missing
    assert len(sound) == len(REPLAY_PANELS) - len(missing)
    for title in sound:
        assert f"config {record['model_config_digest'][:8]}" in title and "unit: " in title, title


def test_a_policy_that_misses_nothing_is_drawn(
    replayed: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    record = replayed("one layer")
    for cell in record["overall"]["policies"]["opt"].values():
        cell["miss_rate"] = 0.0
    settings = PictureSettings(format="svg", panels=("curves",))
    (path,) = draw_replay(record, tmp_path / "replay", settings).paths
    assert ">opt<" in path.read_text()


def _grey(colour: str) -> float:
    return float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114)))


def test_panels_for_a_paper(
    folder_of: Callable[[str], Path], sound: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A column wide, without a title but what forbids a reading; in grey the first colours differ."""
    folder = folder_of("tiers")
    flags = [flag for name in PANELS for flag in ("--panel", name)]
    assert cli.main(["report", str(folder), "--style", "paper", "--format", "svg", *flags]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(sound) == len(PANELS)
    assert all(" ".join(title.split()).startswith("The selections are synthetic") for title in sound)
    for name, panel in PANELS.items():
        path = folder / f"report_{name}.svg"
        assert f"picture: {path}" in said
        assert any(line.startswith(f"caption: {panel.title}: ") for line in said)
        text = path.read_text()
        assert 'width="239.76pt"' in text and "<text" in text and "<dc:date>" not in text
    colours = style_rc(STYLES["paper"])["axes.prop_cycle"].by_key()["color"][:3]
    shades = sorted(float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114))) for colour in colours)
    assert min(np.diff(shades)) > 0.15


@pytest.mark.parametrize("format", ["png", "svg", "pdf"])
def test_the_same_run_is_the_same_bytes(folder_of: Callable[[str], Path], format: str) -> None:
    run, digests = RunReader(folder_of("random weights")), []
    for _ in range(2):
        (path,) = draw(run, settings=PictureSettings(format, panels=("map",))).paths
        assert path.name == f"report_map.{format}"
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert b"CreationDate" not in path.read_bytes()


def test_a_replay_draws_single_panels(
    folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = (
        tmp_path / "out",
        ("--policy", "lru", "--sizes", "1k", "--panel", "curves", "--format", "svg"),
    )
    for _ in range(2):  # the folder is a replay's still
        assert cli.main(["replay", str(folder_of("one layer")), *flags, "--out", str(out)]) == 0
        assert f"picture: {out / 'replay_curves.svg'}" in capsys.readouterr().out
        assert "<text" in (out / "replay_curves.svg").read_text()
    assert not (out / "replay.png").exists()
    asked = ["replay", str(folder_of("one layer")), "--panel", "map", "--out", str(tmp_path / "no")]
    line = told_error(capsys, lambda: cli.main(asked))
    assert "--panel map: no such panel; use curves, misses, between, layers, reuse, lags" in line
    assert not (tmp_path / "no").exists()


REFUSED = {
    ("--panel", "heat"): "--panel heat: no such panel; use blocks, map, overlap, offsets, needle, found",
    ("--panel", "found"): "--panel found: HBM held everything. Leave it out",
    ("--panel", "map", "--no-figure"): "--panel with --no-figure, which draws no picture",
    ("--format", "svg", "--json"): "--format with --json, which draws no picture",
    ("--layer", "7"): "--layer 7: the run has layers 0 to 2",
}


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_what_cannot_be_drawn_is_refused(
    folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str], flags: tuple[str, ...]
) -> None:
    line = told_error(capsys, lambda: cli.main(["report", str(folder_of("random weights")), *flags]))
    assert REFUSED[flags] in line


def test_equal_baselines_are_both_seen(folder_of: Callable[[str], Path]) -> None:
    """The dashes of one lie in the gaps of the other, whatever their colours."""
    subject = RunSubject(RunReader(folder_of("random weights")))
    for key in ("step_overlap", "layer_overlap"):
        subject.summary[key]["random_mean"] = 0.5
    with mpl.rc_context(style_rc(STYLES["screen"])):
        figure = Figure(figsize=STYLES["screen"].size, layout="constrained")
        FigureCanvasAgg(figure)
        draw_panel(figure, PANELS["overlap"], subject, STYLES["screen"], "")
        lines = [line for line in figure.axes[0].lines if "at random" in line.get_label()]
        shown = []
        for line in lines:
            line.set(color="k", linewidth=1.8)
            for other in figure.axes[0].lines:
                other.set_visible(other is line)
            figure.canvas.draw()
            shown.append(np.asarray(figure.canvas.buffer_rgba())[..., 0] < 128)
    assert len(shown) == 2
    alone = [(one & ~other).sum() for one, other in (shown, shown[::-1])]
    frame = (shown[0] & shown[1]).sum()
    assert min(alone) > 200, (alone, frame)
