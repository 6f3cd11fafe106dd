"""The last section: with which command, versions and files the run was made, and the page."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator

from ...version import __version__
from ..grid import MAX_ROWS, number
from .material import Material
from .section import Row, Section, table_html


def how_it_was_made(material: Material) -> Section:
    body = table_html((("", ""), list(_facts(material))), "The run")
    files = material.manifest.get("files") or {}
    digests = [
        (name, number(told["bytes"], ",d"), told["sha256"])
        for name, told in itertools.islice(files.items(), MAX_ROWS)
    ]
    if digests:
        more = f" (and {len(files) - MAX_ROWS:,} more in its manifest)" if len(files) > MAX_ROWS else ""
        body += table_html((("file", "bytes", "SHA-256"), digests), f"Its files{more}")
    note = "Digests are those of the run's end: dsatrace verify compares them and re-derives every record."
    return Section("made", "How it was made", body, note, material.command("verify"))


def _facts(material: Material) -> Iterator[Row]:
    manifest = material.manifest
    argv = manifest.get("argv") or []
    yield "its command's arguments", shlex.join(map(str, argv)) if argv else "-"
    yield "begun (UTC)", f"{manifest['started_utc']}"
    yield "state", material.run.state
    yield "dsatrace", f"{manifest['tool_version']} (this page: {__version__})"
    yield "model's configuration", f"{manifest['model_config_digest']}"
    for name, key in (
        ("data", "data_source"),
        ("tokenizer", "tokenizer"),
        ("chat form", "chat"),
        ("device", "device"),
        ("stands in for HBM", "hbm_stand_in"),
        ("ranks", "world_size"),
        ("seed", "seed"),
    ):
        if manifest.get(key) is not None:
            yield name, f"{manifest[key]}"
    trace = manifest["trace"]
    yield "trace", ", ".join(f"{name} {value}" for name, value in trace.items() if value is not None)
    if material.replay is not None:
        settings = json.dumps(material.replay["settings"], ensure_ascii=False)
        yield "replay's settings", settings
