"""A run as one file of HTML: it opens from disk, reads without JavaScript, and asks no other address.

What a section shows and why it may be left out, its own file knows; here are their order and the page
around them. The same run and the same replay give the same bytes.

    write_page(page_html(Material.of(RunReader("outputs/mine"), record)), Path("page.html"))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

from ...errors import UserError
from ...files import write_atomically
from ...version import __version__
from .blocks_touched import blocks_touched
from .cost import cost_and_crossover
from .layer_misses import misses_by_layer, misses_by_step
from .layer_overlap import layer_overlap
from .made import how_it_was_made
from .material import Material
from .miss_curve import miss_curve, sizes_that_serve
from .moved import kv_found_and_moved
from .offsets import offsets
from .over_time import requests_over_time
from .position_maps import position_maps
from .prefix import shared_prefix
from .reuse import reuse, step_overlap, working_set
from .section import LeftOut, Section, prose, told
from .verdict import header, verdict, warnings_of

MAX_BYTES = 2_000_000
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "base-uri 'none'; form-action 'none'"
)
SECTIONS: tuple[Callable[[Material], Section | LeftOut], ...] = (
    miss_curve,
    misses_by_step,
    misses_by_layer,
    layer_overlap,
    position_maps,
    blocks_touched,
    kv_found_and_moved,
    shared_prefix,
    reuse,
    step_overlap,
    working_set,
    offsets,
    cost_and_crossover,
    requests_over_time,
    how_it_was_made,
)
"""In the page's order: what it misses, where, what it touches, what that costs, how it was made."""


def write_page(page: str, out: Path) -> None:
    """Raises `UserError` if the file cannot be written."""
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise UserError(f"--html {out}: cannot write the page: {error.strerror}") from error


def said_first(material: Material) -> list[str]:
    """The page's answer as lines for a terminal: what forbids believing it, the verdict, sizes that serve."""
    lines = [*warnings_of(material), "".join(verdict(material))]
    if material.replay is not None:
        lines.append("".join(sizes_that_serve(material, material.replay)).strip())
    return lines


def page_html(material: Material) -> str:
    made = [make(material) for make in SECTIONS]
    name = material.run.folder.absolute().name
    return document(name, header(material), made, f"{material.run.folder}")


def document(
    name: str, head: str, made: Sequence[Section | LeftOut], source: str, *, wide: bool = False
) -> str:
    """The page around its head, which is HTML, and its sections; `source` is what it was made from."""
    sections = [one for one in made if isinstance(one, Section)]
    left_out = [one for one in made if isinstance(one, LeftOut)]
    body = '<body class="wide">' if wide else "<body>"
    links = "".join(f'<li><a href="#{one.key}">{told(one.title)}</a></li>' for one in sections)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{told(POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="dsatrace {told(__version__)}">\n'
        f"<title>{told(f'{name} - dsatrace')}</title>\n<style>\n{_asset('style.css')}</style>\n</head>\n"
        f"{body}\n{head}\n<main>\n"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n'
        + "\n".join(one.html() for one in sections)
        + _left_out(left_out)
        + f"\n</main>\n<footer><p>Made by dsatrace {told(__version__)} from {told(source)}. "
        f"Everything is in this file.</p></footer>\n"
        f"<script>\n{_asset('page.js')}{_asset('cost.js')}</script>\n</body>\n</html>\n"
    )


def _left_out(sections: list[LeftOut]) -> str:
    """A line per reason, with the titles that it keeps from the page."""
    if not sections:
        return ""
    titles: dict[str, list[str]] = {}
    for one in sections:
        titles.setdefault(one.why, []).append(f"<span>{told(one.title)}</span>")
    lines = "".join(
        f"<li>{' '.join(names)} {prose(why[:1].upper() + why[1:])}.</li>" for why, names in titles.items()
    )
    return (
        '\n<section id="left-out" aria-labelledby="left-out-title">'
        '<h2 id="left-out-title">Not shown, and why</h2>'
        f'<ul class="left-out">{lines}</ul></section>'
    )


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
