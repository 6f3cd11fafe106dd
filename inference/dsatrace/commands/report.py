"""`dsatrace report`: what a traced run or a study found: tables and a picture of a run, or its page.

dsatrace report outputs/generate_20260101_120000
dsatrace report outputs/generate_20260101_120000 --html page.html
dsatrace report outputs/a outputs/b --html both.html
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsatrace.commands.damage import damage_named
from dsatrace.commands.parser import CommandParser, count
from dsatrace.commands.picture_flags import add_picture_flags, picture_flags_given, picture_settings
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain

if TYPE_CHECKING:
    from dsatrace.report.page.material import Material
    from dsatrace.trace.reader import RunReader

PAGE_POLICIES = ("lru", "fifo", "opt")
PAGE_SIZES = "1k,1.5k,2k,3k,4k,8k"
MOST_IDS = 40_000_000
"""Selected ids that the page's command replays itself, in less than a minute of one core: it takes 0.6 us per
id where a step selects 2,048, and 1.3 where it selects 192."""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables and draws the picture, or writes the page; returns the exit code."""
    parser = CommandParser(
        "report",
        "Show what a traced run or a study found.",
        examples="""
        %(prog)s outputs/generate_20260101_120000
        %(prog)s outputs/mine outputs/theirs --html both.html
        %(prog)s outputs/mine --panel overlap --panel map --layer 2 --format pdf --style paper
        """,
    )
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN",
        help="folder of the run, or of a study; of two or three runs, which a page compares",
    )
    parser.add_argument(
        "--layer",
        type=int,
        help="layer of the map (default: the one that selects most of the answer; without an answer the one "
        "with the least overlap with the step before; of the page: some, chosen by a rule that it states)",
    )
    parser.add_argument(
        "--request",
        metavar="ID",
        help="whose positions the page draws (default: the first request past top-k, of those whose answer's "
        "place is known where any is)",
    )
    parser.add_argument(
        "--bytes-per-token",
        type=count,
        metavar="N",
        help="of a study's page: KV that a token takes in all layers together, such as 40016 for "
        "DeepSeek-V3.2 in fp8; capacities are then told in GiB too",
    )
    parser.add_argument(
        "--json", action="store_true", help="print the tables as JSON, with plain numbers; draw no picture"
    )
    parser.add_argument(
        "--html",
        type=Path,
        metavar="FILE",
        help="write all of it as one page that opens in a browser; prints no tables and draws no picture",
    )
    parser.add_argument(
        "--replay",
        type=Path,
        action="append",
        metavar="DIR",
        help="what `dsatrace replay` found in this run, for the page; of several runs one each, in their "
        "order (default: the page's command replays what takes up to a minute)",
    )
    add_picture_flags(parser)
    args = parser.parse_args(argv)
    for_page = {
        "--replay": args.replay and args.replay[0],
        "--request": args.request,
        "--bytes-per-token": args.bytes_per_token,
    }
    for flag, value in for_page.items():
        if args.html is None and value is not None:
            raise UserError(f"{flag} {plain(value)}: is for the page; add --html FILE")
    if args.html is None and len(args.runs) > 1:
        raise UserError(f"{plain(args.runs[1])}: several runs are compared on a page; add --html FILE")
    if args.html is not None:
        others = {"--no-figure": args.no_figure, "--json": args.json}
        if wrong := [*(flag for flag, given in others.items() if given), *picture_flags_given(args)]:
            raise UserError(f"{wrong[0]} with --html: it has no meaning for the page; leave it out")
        return _page(args.runs, args.html, args.replay, args.request, args.layer, args.bytes_per_token)

    from dsatrace.report.figure import PANELS, draw
    from dsatrace.report.grid import WIDE, WIDTH, show
    from dsatrace.report.parts import parts_json, report_parts
    from dsatrace.report.study_folder import is_study
    from dsatrace.trace.reader import RunReader

    (folder,) = args.runs
    a_study = is_study(folder)
    given = [*picture_flags_given(args), *(["--layer"] if args.layer is not None else [])]
    if a_study and given:
        raise UserError(f"{given[0]}: {folder} is a study, which drew its pictures when it ran; leave it out")
    settings = picture_settings(args, PANELS, none="--json" if args.json else "--no-figure")
    with damage_named(folder) if not a_study else contextlib.nullcontext():
        parts = report_parts(folder)
        if args.json:
            print(json.dumps(parts_json(parts), indent=1, allow_nan=False))
            return 0
        show(parts, WIDE if a_study else WIDTH)
        if settings and not a_study:
            show(draw(RunReader(folder), args.layer, settings).lines())
    return 0


def _page(
    folders: Sequence[Path],
    out: Path,
    replays: Sequence[Path] | None,
    request: str | None,
    layer: int | None,
    bytes_per_token: int | None,
) -> int:
    from dsatrace.report.grid import show
    from dsatrace.report.page.comparison import MOST_RUNS, comparison_html, require_comparable
    from dsatrace.report.page.material import Material
    from dsatrace.report.page.page import page_html, said_first, write_page
    from dsatrace.report.study_folder import is_study
    from dsatrace.trace.reader import RunReader

    if study := next(filter(is_study, folders), None):
        if len(folders) > 1:
            raise UserError(f"{study}: a study has a page of its own; name it alone")
        for_runs = {"--replay": replays, "--request": request, "--layer": layer}
        return _study_page(study, out, bytes_per_token, for_runs)
    if bytes_per_token is not None:
        raise UserError(f"--bytes-per-token {bytes_per_token}: is for a study's page; a run tells its own")
    if len(folders) > MOST_RUNS:
        raise UserError(f"{folders[MOST_RUNS]}: a page compares at most {MOST_RUNS} runs; leave some out")
    if replays is not None and len(replays) != len(folders):
        raise UserError(f"--replay: {len(replays)} for {len(folders)} runs; give one per run, in their order")
    with damage_named(*folders):
        runs = [RunReader(folder) for folder in folders]
        materials = [Material.of(run, "", request, layer) for run in runs]
        require_comparable(materials)  # before the minutes
        records = list(map(_replay, runs)) if replays is None else list(map(_read_replay, runs, replays))
        materials = list(map(Material.with_replay, materials, records))
        page = (
            page_html(materials[0]) if len(materials) == 1 else comparison_html(materials, _same(materials))
        )
        write_page(page, out)
    for material in materials:
        show([f"{material.run.folder}"] * (len(materials) > 1) + said_first(material))
    show([f"page: {out}"])
    return 0


def _study_page(folder: Path, out: Path, bytes_per_token: int | None, for_runs: Mapping[str, object]) -> int:
    from dsatrace.report.grid import show
    from dsatrace.report.page.page import write_page
    from dsatrace.report.page.study_page import study_html

    if wrong := [flag for flag, value in for_runs.items() if value is not None]:
        raise UserError(f"{wrong[0]}: is for the page of a run, and {folder} is a study; leave it out")
    write_page(study_html(folder, bytes_per_token), out)
    show([f"page: {out}"])
    return 0


def _same(materials: Sequence[Material]) -> dict[str, Any] | str:
    """What `dsatrace diff` says of two runs, or why it cannot: a clause."""
    from dsatrace.captures.diff import diff
    from dsatrace.trace.load import load

    if len(materials) > 2:
        return "only two runs are compared so"
    ids = sum(m.summary["counts"]["records"] * m.kind.max_width for m in materials)
    if ids > MOST_IDS:
        return "reading both runs takes more than a minute; run `dsatrace diff`"
    try:
        a, b = (load(material.run.folder) for material in materials)
        return diff(a, b).to_json()
    except UserError as error:
        return f"{error}"


def _read_replay(run: RunReader, folder: Path) -> dict[str, Any]:
    """The figures of a finished replay. Raises `UserError` unless it is one of this run alone."""
    from dsatrace.files import read_json
    from dsatrace.selection_replay.figures import figures
    from dsatrace.selection_replay.result import Result

    path = folder / "replay.json" if folder.is_dir() else folder
    name = f"--replay {path}"
    record = read_json(path, name, broken="; replay the run again")
    result = Result.from_json(record.get("sums") if isinstance(record, dict) else None, name)
    replayed = {request.partition("/")[2] for request in result.requests}
    if not (
        result.header["model_config_digest"] == run.manifest["model_config_digest"]
        and len(replayed) == len(result.requests)
        and replayed <= {request["request_id"] for request in run.requests()}
    ):
        raise UserError(f"{name}: is not of {run.folder} alone; name the folder of that run's replay")
    return {**result.header, **figures(result), "chosen": record.get("chosen")}


def _replay(run: RunReader) -> dict[str, Any] | str:
    """The figures of a replay of the run, as replay.json has them; or why there are none: a clause."""
    from dsatrace.commands.progress import counted_bar
    from dsatrace.selection_replay.answers import add_answers
    from dsatrace.selection_replay.figures import figures
    from dsatrace.selection_replay.replay import replay_all
    from dsatrace.selection_replay.settings import ReplaySettings, parse_sizes
    from dsatrace.selection_replay.work import find_work
    from dsatrace.trace.manifest import selection_kind

    counts, kind = run.summary()["counts"], selection_kind(run.manifest)
    if not counts["sparse_records"]:
        return "no record is past top-k, so no buffer could miss anything"
    if kind is not None and counts["records"] * kind.max_width > MOST_IDS:
        return (
            f"replaying its {counts['records']:,} records takes more than a minute; run "
            f"`dsatrace replay {run.folder}`, then add --replay with its folder"
        )
    trace = run.manifest["trace"]
    block = trace["block_size_tokens"] if trace["level"] == "blocks" else None
    settings = ReplaySettings(policies=PAGE_POLICIES, sizes=parse_sizes(PAGE_SIZES), block=block)
    try:
        work = find_work([run.folder], settings)
        with counted_bar("replay", sum(one.num_records for one in work), "records") as advance:
            result = replay_all(work, settings, advance=advance)
    except UserError as error:  # its selections cannot be replayed; the rest of the page stands
        return f"{error}".removeprefix(f"{run.folder}: ")
    record = {**result.header, **figures(result)}
    add_answers(record, None, None, None, None, None)
    return record
