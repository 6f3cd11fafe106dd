"""What every picture shares: a figure that is saved when it is done, and labels that are plain text.

with picture(path, (7, 5), without="--skip-visualization") as (figure, (axes,)):
    axes.plot(values, label=plain_label(name))
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..text import for_picture

DPI = 120
LABEL_CHARS = 40


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
    """A figure of `size` inches and its axes, row by row. It is saved if the block does not raise.

    Raises a `UserError` if the file cannot be written; `without` is the flag that draws none.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, sharey=share_y
    )
    try:
        yield figure, list(axes.flat)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"{path}: cannot write the picture: {error.strerror}; use {without}") from error
    finally:
        plt.close(figure)


def plain_label(label: str) -> str:
    """As plain text: a dollar would begin a formula, and a leading underscore would hide the label."""
    text = label if len(label) <= LABEL_CHARS else f"{label[: LABEL_CHARS - 1]}…"
    return " ".join(for_picture(text).replace("_", " ").split()) or "unnamed"


def whole_numbers(axis: Any) -> None:
    """Ticks at whole numbers only."""
    axis.get_major_locator().set_params(integer=True)
