"""Where a data set's rows come from in this run: a file, the hub, or what is embedded.

A source that the user names is used, or the run ends with one line. Otherwise: the files in
`data/<name>/`, else the hub if it is on and answers in time, else the embedded sample. Reads no rows.

    source = find_source(DATA_SETS["sharegpt"], say=print)
    ShareGPTLoader(source.file)
    source.description      # for the manifest: "embedded sharegpt_sample.json sha256:..."
    source.text()           # for the terminal: that, and why
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.data_set import DataSet, Source
from dsatrace.workloads.digests import file_sha256, folder_sha256
from dsatrace.workloads.exports import SOURCE_FILE, read_export
from dsatrace.workloads.hub import (
    PROBE_S,
    HubError,
    Located,
    default_data_folder,
    download,
    hub_is_off,
    locate,
)
from dsatrace.workloads.samples import sample_file


def find_source(
    data_set: DataSet,
    explicit: Path | None = None,
    *,
    repo: str | None = None,
    revision: str | None = None,
    use_hub: bool = True,
    data: Path | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Source:
    """The rows of a data set: `explicit` names a path, `repo` or `revision` the hub.

    `say` is told before a download begins. Raises `UserError` for a named source that cannot
    be had, for bytes that are not the pinned ones, for a download that breaks off, and where
    `data/<name>/` holds several files.
    """
    data = data or default_data_folder()
    file = data_set.hub_file(repo, revision=revision)

    def from_hub(located: Located, reason: str) -> Source:
        if located.url is not None:
            say(f"{data_set.name}: from the hub: {located.text()}")
        fetched = download(located, data_set.remedy())
        return Source(data_set.name, fetched.path, f"hub {fetched.text()}", reason)

    if explicit is not None and (repo or revision):
        raise UserError(f"{data_set.name}: {explicit} and the hub are both asked for; name one of them")
    if explicit is not None:
        return _file_source(data_set, explicit, "as named")
    if repo or revision:
        return from_hub(locate(file, data / ".hub", data_set.remedy(), PROBE_S), "as named")
    found = _found_in(data / data_set.name, data_set)
    if found:
        return found
    nothing = f"nothing lies in data/{data_set.name}"
    if not use_hub or hub_is_off():
        return _stand_in(data_set, f"{nothing}, and the hub is switched off")
    try:
        located = locate(file, data / ".hub", data_set.remedy(), PROBE_S)
    except HubError as error:
        return _stand_in(data_set, f"{nothing}, and {error.reason}")
    return from_hub(located, nothing)


def _file_source(data_set: DataSet, path: Path, reason: str) -> Source:
    """A file, or for RULER a folder of them."""
    if not path.is_dir():
        description = f"file {path.name} sha256:{file_sha256(path)}"
    elif data_set.folders:
        description = f"folder {path.absolute().name} sha256:{folder_sha256(path)}"
    else:
        raise UserError(f"{path}: is a folder; name the file in it with {data_set.file_flag}")
    return Source(data_set.name, path, description, reason)


def _found_in(folder: Path, data_set: DataSet) -> Source | None:
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
    found = _file_source(data_set, files[0], f"found in data/{data_set.name}")
    if export is None:
        return found
    origin = "exported from" if found.description.endswith(export.sha256) else "changed since its export from"
    return dataclasses.replace(found, description=f"{found.description}, {origin} {export.text()}")


def _stand_in(data_set: DataSet, reason: str) -> Source:
    reason = f"{reason}; {data_set.remedy()}"
    if data_set.sample is None:
        return Source(data_set.name, None, "generator", reason)
    path = sample_file(data_set.sample)
    description = f"embedded {path.name} sha256:{file_sha256(path)}"
    return Source(data_set.name, path, description, reason)
