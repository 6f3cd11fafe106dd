"""`dsatrace study report`: the tables of finished studies again, several at once, and their pictures.

dsatrace study report outputs/mine outputs/other
dsatrace study report outputs/mine --output-dir outputs/drawn_again
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dsatrace.commands.study import options
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.study.output_folder import check_output, file_labels, open_study


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints every folder's tables, and draws its pictures into a new folder if asked to."""
    args = _parser().parse_args(argv)

    from dsatrace.report.grid import WIDE, Grid, show
    from dsatrace.report.study_folder import draw_again, is_study, study_parts

    for folder in args.folders:
        if not is_study(folder):
            raise UserError(f"{folder}: not the folder of a study; name one that `dsatrace study` wrote")
    if args.output_dir is not None:
        check_output(args.output_dir)
    for folder in args.folders:
        parts = list(study_parts(folder))
        if args.markdown:
            options.show([part for part in parts if isinstance(part, Grid)], as_markdown=True)
        else:
            show(parts, WIDE)
    if args.output_dir is not None:
        about = {"study": "report", "folders": [str(folder) for folder in args.folders]}
        labels = file_labels([str(folder.resolve().name) for folder in args.folders])
        with open_study(args.output_dir, about) as output:
            for folder in args.folders:
                label = labels[folder.resolve().name] if len(args.folders) > 1 else ""
                for line in draw_again(folder, output.labelled(label)):
                    print(line)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.new_parser(
        "report",
        "Show finished studies again.",
        """
        %(prog)s outputs/mine outputs/other
        %(prog)s outputs/mine --output-dir outputs/drawn_again
        """,
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="folder of a study")
    parser.add_argument(
        "--output-dir", type=Path, help="new or empty folder for the pictures (default: none)"
    )
    parser.add_argument("--markdown", action="store_true", help="print tables as markdown")
    return parser
