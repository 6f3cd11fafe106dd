"""What every picture shares: a figure that is saved when it is done, and labels that are plain text.

A picture is a PNG, an SVG or a PDF, as its file's name ends. The same figure is the same bytes: no file
holds a date or a drawn number, and vector files hold text as text.

    with picture(path, (7, 5), without="--skip-visualization") as (figure, (axes,)):
        axes.plot(values, label=plain_label(name))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text import for_picture

FORMATS = ("png", "svg", "pdf")
DPI = 120
LABEL_CHARS = 40

_NO_DATE: dict[str, dict[str, Any]] = {"png": {}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
_ALWAYS = {"svg.fonttype": "none", "svg.hashsalt": "dsatrace", "pdf.fonttype": 42}


@contextmanager
def blank_picture(
    path: Path, size: tuple[float, float], *, without: str, rc: Mapping[str, Any] | None = None
) -> Iterator[Any]:
    """A figure of `size` inches, drawn under matplotlib's settings `rc`. It is saved if the block does not
    raise.

    Raises a `UserError` if the file cannot be written; `without` is the flag that draws none.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    settings: Any = {"figure.dpi": DPI, "savefig.dpi": DPI, **_ALWAYS, **(rc or {})}
    with mpl.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(path, metadata=_NO_DATE[path.suffix.removeprefix(".")])
        except OSError as error:
            raise UserError(f"{path}: cannot write the picture: {error.strerror}; use {without}") from error


@contextmanager
def picture(
    path: Path,
    size: tuple[float, float],
    *,
    rows: int = 1,
    columns: int = 1,
    share_y: bool = False,
    without: str,
) -> Iterator[tuple[Any, list[Any]]]:
    """The same with axes, row by row."""
    with blank_picture(path, size, without=without) as figure:
        yield figure, list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).flat)


def plain_label(label: str) -> str:
    """As plain text: a dollar would begin a formula, and a leading underscore would hide the label."""
    text = label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"
    return " ".join(for_picture(text).replace("_", " ").split()) or "unnamed"


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only, be it a single one."""
    axis.get_major_locator().set_params(integer=True, min_n_ticks=1)
