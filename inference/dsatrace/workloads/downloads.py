"""Files from the hub, kept: resumed where a download was interrupted, checked by their sha256.

The library's own cache is used where it has the file, but it begins a download anew when
its process ended; here one continues. Downloads lie as `<folder>/<owner>--<name>/<commit>/<file>`,
unfinished ones as `.part` beside it.

    fetched = fetch(HubFile("zai-org/LongBench-v2", "data.json"), Path("data/.hub"))
    fetched.path, fetched.commit, fetched.sha256
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dsatrace.errors import UserError
from dsatrace.workloads.catalog import HubFile
from dsatrace.workloads.digests import Progress, file_sha256, no_progress
from dsatrace.workloads.hub import ANSWER_S, COMMIT, Located, explained, hub_is_off, locate


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A file that lies on this machine; `sha256` is that of the bytes there."""

    file: HubFile
    path: Path
    commit: str
    sha256: str

    def text(self) -> str:
        return f"{self.file.repo}@{self.commit} {self.file.file} sha256:{self.sha256}"


def fetch(
    file: HubFile,
    folder: Path,
    remedy: str = "name a file instead",
    *,
    located: Located | None = None,
    progress: Progress = no_progress,
) -> Fetched:
    """The file, from the library's cache, from `folder` or from the hub, in that order.

    `located` is the answer to a question already asked. Raises `HubError` if the hub does
    not give the file, `UserError` if its bytes are not those of `file.sha256` or the disk
    does not take them; what came of a download that broke off is kept for the next time.
    """
    there = kept_copy(file, folder)
    if there:
        return _checked(file, *there, progress)
    located = located or locate(file, ANSWER_S, remedy)
    wanted = file.sha256 or located.sha256
    if located.sha256 not in (None, wanted):
        raise _mismatch(file, located.sha256, wanted)
    path = _repo_folder(file, folder) / located.commit / file.file
    if path.is_file():
        return _checked(file, path, located.commit, progress)
    with _part_of(path, located) as part:
        with explained(file, remedy):
            _download(located, part)
        found = file_sha256(Path(part.name), progress)
        if wanted not in (None, found):
            Path(part.name).unlink()
            raise _mismatch(file, found, wanted)
        Path(part.name).replace(path)
    return Fetched(file, path, located.commit, found)


def kept_copy(file: HubFile, folder: Path) -> tuple[Path, str] | None:
    """Path and commit of a copy on this machine that needs no question to the hub.

    A commit never changes; a branch may, and is answered from here, by the newest copy,
    only where the hub is switched off.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    pinned = COMMIT.fullmatch(file.revision)
    if not (pinned or hub_is_off()):
        return None
    try:
        cached = try_to_load_from_cache(
            file.repo, file.file, revision=file.revision, repo_type=file.repo_type
        )
    except HFValidationError:  # no repository has such a name: `locate` says so
        return None
    if isinstance(cached, str):
        return Path(cached), Path(cached).parents[len(Path(file.file).parts) - 1].name
    base = _repo_folder(file, folder)
    copies = base.glob(f"{file.revision if pinned else '*'}/{file.file}")
    newest = max(copies, key=lambda path: path.stat().st_mtime, default=None)
    return (newest, newest.relative_to(base).parts[0]) if newest else None


def _repo_folder(file: HubFile, folder: Path) -> Path:
    return folder / file.repo.replace("/", "--")


@contextlib.contextmanager
def _part_of(path: Path, located: Located) -> Iterator[BinaryIO]:
    """The unfinished file beside `path`, open at its end, for this process alone.

    It is named after the content, so that a file which changed on the hub is not continued.
    A disk that does not take it becomes one line.
    """
    content = re.sub(r"[^0-9A-Za-z]", "", located.etag)[:16]
    part = path.with_name(f"{path.name}.{content}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{part}: another process is downloading it; wait for that one") from error
            yield file
    except OSError as error:
        size = "the file" if located.num_bytes is None else f"{located.num_bytes / 1e6:,.1f} MB"
        raise UserError(
            f"{part.parent}: cannot write {size}: {error.strerror or error}; "
            "make room and start again, the download will continue"
        ) from error


def _download(located: Located, part: BinaryIO) -> None:
    """Appends to `part` what is missing of it. Raises the library's errors and the disk's."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size = located.num_bytes
    if size is not None and part.tell() > size:
        part.truncate(0)
        part.seek(0)
    free = shutil.disk_usage(Path(part.name).parent).free
    if size is not None and free < size - part.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    http_get(
        located.url,
        part,
        resume_size=part.tell(),
        headers={**build_hf_headers(), "Accept-Encoding": "identity"},  # ranges count the file's own bytes
        expected_size=size,
        displayed_filename=Path(located.file.file).name,
    )
    part.flush()


def _checked(file: HubFile, path: Path, commit: str, progress: Progress) -> Fetched:
    found = file_sha256(path, progress)
    if file.sha256 not in (None, found):
        raise UserError(
            f"{path}: its sha256 is {found}, that of {file.repo} {file.file} is {file.sha256}; "
            "delete it and fetch it again"
        )
    return Fetched(file, path, commit, found)


def _mismatch(file: HubFile, found: str | None, wanted: str | None) -> UserError:
    return UserError(
        f"{file.repo}@{file.revision} {file.file}: its sha256 is {found}, not {wanted}; "
        "fetch it again, or take what the hub has with --revision"
    )
