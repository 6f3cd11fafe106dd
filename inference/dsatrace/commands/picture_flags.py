"""The flags of commands that draw panels: which of them, in which format and style, or none.

add_picture_flags(parser)
settings = picture_settings(parser.parse_args(argv), PANELS)      # None: no picture
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dsatrace.errors import UserError

if TYPE_CHECKING:
    from dsatrace.report.panels import Panel, PictureSettings


def add_picture_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pictures").add_argument
    add("--no-figure", action="store_true", help="draw no picture")
    add("--format", choices=("png", "svg", "pdf"), help="svg and pdf keep text as text (default: png)")
    add(
        "--panel",
        action="append",
        metavar="NAME",
        help="draw this panel alone, in a file of its own; may be repeated (a wrong name lists them all)",
    )
    add(
        "--style",
        choices=("screen", "paper"),
        help="paper: a column wide, small type, readable in grey, and the title as a caption to copy "
        "(default: screen)",
    )


def picture_flags_given(args: argparse.Namespace) -> list[str]:
    """Those that ask something of a picture."""
    return [f"--{name}" for name in ("format", "panel", "style") if getattr(args, name)]


def picture_settings(
    args: argparse.Namespace, panels: Mapping[str, Panel[Any]], none: str = "--no-figure"
) -> PictureSettings | None:
    """None if no picture is wanted; `none` is the flag that said so. Raises a `UserError` for a panel that
    there is not, and for flags that ask for a picture and for none."""
    from dsatrace.report.panels import PictureSettings, check_names

    check_names(panels, args.panel or ())
    if args.no_figure or none != "--no-figure":
        if given := picture_flags_given(args):
            raise UserError(f"{given[0]} with {none}, which draws no picture: leave one of them out")
        return None
    names = tuple(dict.fromkeys(args.panel or ()))
    return PictureSettings(args.format or "png", args.style or "screen", names)
