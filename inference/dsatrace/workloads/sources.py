"""Where a data set's rows come from in this run: a file, the hub, or what is embedded.

What the user names is taken, or the run ends with one line. Where nothing is named: the
export in `data/<name>/`, else the hub if it answers in time and is not switched off, else
the embedded sample. Whichever it is, it says what and why. Reads no rows.

    source = find_source("sharegpt", say=print)
    ShareGPTLoader(source.path)
    source.description      # for the manifest: "embedded sharegpt_sample.json sha256:..."
    source.text()           # for the terminal: that, and why
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.catalog import data_set_named
from dsatrace.workloads.data_set import DataSet, Source
from dsatrace.workloads.digests import Progress, file_sha256, folder_sha256, no_progress
from dsatrace.workloads.exports import SOURCE_FILE, read_export
from dsatrace.workloads.hub import (
    ANSWER_S,
    PROBE_S,
    HubError,
    HubFile,
    Located,
    default_data_folder,
    fetch,
    hub_is_off,
    kept_copy,
    locate,
)
from dsatrace.workloads.samples import sample_file


def find_source(
    name: str,
    explicit: Path | None = None,
    *,
    repo: str | None = None,
    file: str | None = None,
    revision: str | None = None,
    use_hub: bool = True,
    data: Path | None = None,
    progress: Progress = no_progress,
    say: Callable[[str], object] = lambda line: None,
) -> Source:
    """The rows of `name`: `explicit` is a path; `repo`, `file` or `revision` ask for the hub.

    `say` is told before a download begins, `progress` shows the reading of large files.
    Raises `UserError` for an explicit source that is not to be had, for bytes that are not
    the pinned ones, for a download that breaks off, and where it is not clear which file
    of `data/<name>/` is meant.
    """
    data_set, data = data_set_named(name), data or default_data_folder()
    asked_for_hub = bool(repo or file or revision)
    hub_file = data_set.hub_file(repo, file, revision)
    if explicit is not None and asked_for_hub:
        raise UserError(f"{name}: {explicit} and the hub are both asked for; name one of them")
    if explicit is not None:
        return _file_source(data_set, explicit, "as named", progress)
    if asked_for_hub:
        located = _ask(data_set, hub_file, data, ANSWER_S)
        return _hub_source(data_set, hub_file, located, data, "as named", progress, say)
    lying = _lying_source(data_set, data / name, progress)
    if lying:
        return lying
    nothing = f"nothing lies in data/{name}"
    if not use_hub or hub_is_off():
        return _stand_in(data_set, f"{nothing}, and the hub is switched off")
    try:
        located = _ask(data_set, hub_file, data, PROBE_S)
    except HubError as error:
        return _stand_in(data_set, f"{nothing}, and {error.reason}")
    return _hub_source(data_set, hub_file, located, data, nothing, progress, say)


def _ask(data_set: DataSet, file: HubFile, data: Path, within_s: float) -> Located | None:
    """What the hub says of the file; None where a copy of it is here already."""
    return None if kept_copy(file, data / ".hub") else locate(file, within_s, data_set.remedy())


def _hub_source(
    data_set: DataSet,
    file: HubFile,
    located: Located | None,
    data: Path,
    reason: str,
    progress: Progress,
    say: Callable[[str], object],
) -> Source:
    if located:
        size = "" if located.num_bytes is None else f", {located.num_bytes / 1e6:,.1f} MB"
        say(f"{data_set.name}: from the hub: {file.repo}@{located.commit} {file.file}{size}")
    fetched = fetch(file, data / ".hub", data_set.remedy(), located=located, progress=progress)
    return Source(data_set.name, "hub", fetched.path, f"hub {fetched.text()}", reason)


def _file_source(data_set: DataSet, path: Path, reason: str, progress: Progress) -> Source:
    """A file, or for RULER a folder of them."""
    if not path.is_dir():
        description = f"file {path.name} sha256:{file_sha256(path, progress)}"
    elif data_set.folders:
        description = f"folder {path.absolute().name} sha256:{folder_sha256(path, progress)}"
    else:
        raise UserError(f"{path}: is a folder; name the file in it with {data_set.file_flag}")
    return Source(data_set.name, "file", path, description, reason)


def _lying_source(data_set: DataSet, folder: Path, progress: Progress) -> Source | None:
    """What the download scripts or the user put into `data/<name>/`; the last export before other files."""
    export = read_export(folder)
    if data_set.folders:
        there = (path for pattern in data_set.patterns for path in folder.rglob(pattern))
        files = [folder] if any(path.is_file() for path in there) else []
    else:
        files = [path for pattern in data_set.patterns for path in sorted(folder.glob(pattern))]
        files = [path for path in files if path.name[0] != "." and path.name != SOURCE_FILE]
        files = [path for path in files if export and path.name == export.name] or files
    if not files:
        return None
    if len(files) > 1:
        names = ", ".join(path.name for path in files)
        raise UserError(f"{folder}: holds {names}; name one with {data_set.file_flag}")
    found = _file_source(data_set, files[0], f"found in data/{data_set.name}", progress)
    if export is None:
        return found
    origin = "exported from" if found.description.endswith(export.sha256) else "changed since its export from"
    return dataclasses.replace(found, description=f"{found.description}, {origin} {export.text()}")


def _stand_in(data_set: DataSet, reason: str) -> Source:
    reason = f"{reason}; {data_set.remedy()}"
    if data_set.sample is None:
        return Source(data_set.name, "generator", None, "generator", reason)
    path = sample_file(data_set.sample)
    description = f"embedded {path.name} sha256:{file_sha256(path)}"
    return Source(data_set.name, "embedded", path, description, reason)
