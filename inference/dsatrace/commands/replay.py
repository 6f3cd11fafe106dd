"""`dsatrace replay`: what a hot buffer of any size would have missed of recorded selections.

dsatrace replay outputs/mine
dsatrace replay s3://bucket/run --jobs 16 --out outputs/run_replay
dsatrace replay merge shards/*/replay.json --out outputs/all
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from dsatrace.commands.parser import CommandParser, count, shard
from dsatrace.commands.picture_flags import add_picture_flags, picture_settings
from dsatrace.errors import UserError, exits_cleanly
from dsatrace.text import plain
from dsatrace.trace.url import is_url, run_path

if TYPE_CHECKING:
    from dsatrace.report.panels import PictureSettings
    from dsatrace.selection_replay.result import Result
    from dsatrace.selection_replay.settings import ReplaySettings


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Replays, or merges results; prints the tables, and returns the exit code."""
    argv = sys.argv[1:] if argv is None else list(argv)
    return _merge(argv[1:]) if argv[:1] == ["merge"] else _replay(argv)


def _replay(argv: Sequence[str]) -> int:
    from dsatrace.selection_replay.on_ray import require_ray
    from dsatrace.selection_replay.policies import POLICIES
    from dsatrace.selection_replay.settings import ReplaySettings, Share, Start, WhichSteps

    parser = CommandParser(
        "replay",
        "Replay recorded selections through hot buffers: what each size and policy misses, and what the best "
        "possible one would.",
        examples="""
        %(prog)s outputs/mine --sizes 1k,2k,4k --policy lru,opt
        %(prog)s outputs/mine --unit block:16 --sizes 8k,16k
        %(prog)s merge shards/*/replay.json --out outputs/all
        """,
    )
    defaults = ReplaySettings()
    parser.add_argument(
        "runs",
        nargs="+",
        type=run_path,
        metavar="RUN",
        help="folder of a run, or its URL (s3://, gs://, ...)",
    )
    add = parser.add_argument
    usual = ",".join(defaults.policies)
    add("--policy", help=f"which id leaves: some of {', '.join(POLICIES)} (default: {usual})")
    add(
        "--sizes",
        default=",".join(defaults.size_labels),
        help="of the buffer, in ids of the run's unit: 4096, multiples of top-k such as 2k, or shares of the "
        "context such as 10%%",
    )
    add(
        "--unit",
        default="run",
        metavar="UNIT",
        help="moved as one: the run's own unit, or block:N of N tokens",
    )
    add("--pin-newest", action="store_true", help="the query's own token has a slot outside the buffer")
    add(
        "--start",
        choices=get_args(Start),
        default=defaults.start,
        help="what the buffer holds at first: nothing, the first ids, the first step's set (which is not "
        "counted), or what the recorded prompt rows leave in it",
    )
    add(
        "--share",
        choices=get_args(Share),
        default=defaults.share,
        help="request: its layers share a buffer; prefix: requests that begin alike do, per layer",
    )
    add(
        "--steps",
        choices=get_args(WhichSteps),
        default=defaults.steps,
        help="all, or those that say the answer, of runs made with --ignore-eos or --min-new-tokens",
    )
    add(
        "--union",
        type=int,
        default=defaults.union,
        metavar="N",
        help="rows per step, as in speculative decoding",
    )
    add("--seed", type=int, default=defaults.seed, help="of the policy that draws lots, and of the nulls")
    _add_answers(parser)
    _add_output(parser, "folder of the result; a replay that was killed goes on there (default: RUN_replay)")
    add("--jobs", type=count, default=1, metavar="N", help="processes")
    add(
        "--shard",
        type=shard,
        default=(0, 1),
        metavar="I/N",
        help="only every N-th file of a run laid out for replay, or part of another, from the I-th on "
        "(default: 0/1, all)",
    )
    add(
        "--engine",
        choices=("processes", "ray"),
        default="processes",
        help="who replays: --jobs processes, or all of a ray cluster (default: processes)",
    )
    args = parser.parse_args(argv)
    settings, pictures = _settings(args), _pictures(args)
    on_ray = args.engine == "ray"
    if on_ray:
        if args.jobs > 1:
            raise UserError(f"--jobs {args.jobs} with --engine ray: the cluster's CPUs decide; leave it out")
        require_ray()
    out = _out_folder(args.out or _beside(args.runs[0]))

    from dsatrace.commands.damage import damage_named
    from dsatrace.commands.progress import counted_bar
    from dsatrace.selection_replay.replay import replay_all
    from dsatrace.selection_replay.work import find_work

    with damage_named(*args.runs):
        work = find_work(args.runs, settings, args.shard)
        if not work:
            raise UserError(
                f"--shard {'/'.join(map(str, args.shard))}: the runs have fewer parts; use a smaller N"
            )
        with counted_bar("replay", sum(one.num_records for one in work), "records") as advance:
            result = replay_all(work, settings, args.jobs, out / "parts", advance, on_ray)
    return _finish(result, out, args, pictures, _whose(args.runs))


def _whose(runs: Sequence[Path]) -> str:
    """Whose selections a picture shows: the model, and the run by the last two names of its path."""
    from dsatrace.report.tables import named_model
    from dsatrace.trace.reader import RunReader

    model = named_model(RunReader(runs[0]).manifest) or "a model"
    names = ["/".join(str(run).rstrip("/").split("/")[-2:]) for run in runs]
    return f"{model} in {names[0] if len(names) == 1 else f'{len(names)} runs'}"


def _merge(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "replay merge",
        "Add results of `dsatrace replay`, of other runs or other shards of them.",
        examples="%(prog)s shards/*/replay.json --out outputs/all",
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="replay.json, or its folder")
    _add_answers(parser)
    _add_output(parser, "folder of the result")
    args = parser.parse_args(argv)
    if args.out is None:
        raise UserError("--out DIR is missing: name the folder of the merged result")
    pictures = _pictures(args)

    from dsatrace.selection_replay.result import Result

    paths = [path / "replay.json" if path.is_dir() else path for path in args.results]
    total = Result.read(paths[0])
    for path in paths[1:]:
        total.add(Result.read(path), str(path))
    return _finish(total, _out_folder(args.out), args, pictures)


def _add_answers(parser: argparse.ArgumentParser) -> None:
    """The flags of what is derived from a result."""
    add = parser.add_argument_group("the answer, for one size").add_argument
    add("--choose", metavar="SIZE", help="one of --sizes (default: 2k)")
    add(
        "--link",
        metavar="NAME",
        help="model the fetches on it: pcie5-x16, nvlink-c2c, ..., or FILE.json#NAME",
    )
    add(
        "--compute-us", metavar="US", help="of a layer's decode step on your device: BASE or BASE+PER_REQUEST"
    )
    add(
        "--hbm-gb",
        type=float,
        metavar="GB",
        help="HBM for KV (10^9 bytes): from which batch and context the buffer pays",
    )
    add("--measured", type=Path, metavar="FILE", help="an engine's counters to set beside the prediction")


def _add_output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", help=text)
    add_picture_flags(parser)


def _settings(args: argparse.Namespace) -> ReplaySettings:
    from dsatrace.selection_replay.settings import OWN_BUFFERS, ReplaySettings, parse_sizes, parse_unit

    policies = ReplaySettings.policies
    if args.policy is not None:
        policies = tuple(name.strip() for name in args.policy.split(","))
    elif args.share != "none":
        policies = tuple(name for name in policies if name not in OWN_BUFFERS)
    return ReplaySettings(
        policies=policies,
        sizes=parse_sizes(args.sizes),
        block=parse_unit(args.unit),
        pin_newest=args.pin_newest,
        start=args.start,
        share=args.share,
        steps=args.steps,
        union=args.union,
        seed=args.seed,
    )


def _beside(run: Path) -> Path:
    """The usual folder of a run's result; of a run at a URL it is here."""
    name = f"{run.absolute().name}_replay"
    return run.absolute().with_name(name) if isinstance(run, Path) else Path(name)


def _out_folder(folder: Path) -> Path:
    """Made if it is not there; refused if it holds anything but a replay."""
    if is_url(folder):
        raise UserError("--out: name a folder of this machine, and copy it to a URL when it is done")
    ours = re.compile(r"parts|replay\.(json|csv)|replay(_[a-z]+)?\.(png|svg|pdf)")
    try:
        foreign = (
            sorted(path.name for path in folder.iterdir() if not ours.fullmatch(path.name))
            if folder.exists()
            else []
        )
        if foreign:
            raise UserError(
                f"{folder}: holds {foreign[0]}, so it is no replay's folder; name another with --out"
            )
        (folder / "parts").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot make it: {error.strerror}; name another with --out") from error
    return folder


def _pictures(args: argparse.Namespace) -> PictureSettings | None:
    """What to draw; asked before anything is replayed."""
    from dsatrace.report.replay_figure import PANELS

    return picture_settings(args, PANELS)


def _finish(
    result: Result, out: Path, args: argparse.Namespace, pictures: PictureSettings | None, whose: str = ""
) -> int:
    """Writes and shows what was found."""
    from dsatrace.report.grid import WIDE, show
    from dsatrace.report.replay_tables import replay_parts
    from dsatrace.selection_replay.answers import add_answers
    from dsatrace.selection_replay.figures import figures
    from dsatrace.selection_replay.output import write_result

    record = {**result.header, **figures(result)}
    add_answers(record, args.choose, args.link, args.compute_us, args.hbm_gb, args.measured)
    write_result(record, result, out)
    show(replay_parts(record), WIDE)
    print(f"all figures: {plain(out / 'replay.json')}; as a table: replay.csv")
    if pictures:
        from dsatrace.report.replay_figure import draw_replay

        show(draw_replay(record, out / "replay", pictures, whose).lines())
    return 0


if __name__ == "__main__":
    sys.exit(main())
