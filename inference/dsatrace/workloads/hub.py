"""Files from the Hugging Face hub: asked for within a time limit, kept, and checked by their sha256.

`huggingface_hub` makes the requests, so HF_TOKEN, a cached login, HF_ENDPOINT, HF_HUB_OFFLINE
and proxies mean what they mean elsewhere, and what its cache holds is used. Three things are
added: no question hangs, every error is one line without a token, and an interrupted download
continues (the library deletes an unfinished file when its process ends).

Downloads lie as `<folder>/<owner>--<name>/<commit>/<file>`, unfinished ones as `.part` beside it.

    fetched = fetch(HubFile("zai-org/LongBench-v2", "data.json"), Path("data/.hub"))
    fetched.path, fetched.commit, fetched.sha256
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import os
import re
import shutil
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from dsatrace.errors import UserError
from dsatrace.workloads.digests import Progress, file_sha256, no_progress

PROBE_S = 5.0  # how long the hub may take to say that it is there
ANSWER_S = 30.0  # the same where the user asked for the hub by name
REMEDY = "name a file instead"

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "true", "yes", "on"}

Answer = TypeVar("Answer")


class HubError(UserError):
    """The hub does not give the file. `reason` is why, in a few words and without a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of a hub repository. `sha256` is what its bytes must be; None: they are taken as they come."""

    repo: str
    file: str
    revision: str = "main"
    sha256: str | None = None
    repo_type: Literal["dataset", "model"] = "dataset"

    def __post_init__(self) -> None:
        parts = self.file.split("/")
        if not self.file or self.file.startswith("/") or not {"", ".", ".."}.isdisjoint(parts):
            raise UserError(f"{self.file!r} is no file of a hub repository; give its path there")


@dataclasses.dataclass(frozen=True)
class Located:
    """What the hub says of a file: where it is, of which commit, and how many bytes."""

    file: HubFile
    url: str
    commit: str
    etag: str
    num_bytes: int | None

    @property
    def sha256(self) -> str | None:
        """The file's sha256, which the hub names for large files; small ones go by git's hash."""
        return self.etag if _SHA256.fullmatch(self.etag) else None


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A file that lies on this machine; `sha256` is that of the bytes there."""

    file: HubFile
    path: Path
    commit: str
    sha256: str

    def text(self) -> str:
        return f"{self.file.repo}@{self.commit} {self.file.file} sha256:{self.sha256}"


def default_data_folder() -> Path:
    """DSATRACE_DATA, or `data/` of the checkout, or that of the working directory where there is none."""
    if os.environ.get("DSATRACE_DATA"):
        return Path(os.environ["DSATRACE_DATA"])
    root = Path(__file__).resolve().parents[3]
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "data"


def hub_is_off() -> bool:
    """Whether the environment forbids the hub, by the library's own variables."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in _TRUE


def locate(file: HubFile, within_s: float = ANSWER_S, remedy: str = REMEDY) -> Located:
    """Asks the hub for a file's metadata; raises `HubError` if it has not answered after `within_s`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    if hub_is_off():
        raise HubError("the hub is switched off by HF_HUB_OFFLINE", f"unset it, {remedy}")
    host = _endpoint()
    try:
        url = hf_hub_url(
            file.repo, file.file, repo_type=file.repo_type, revision=file.revision, endpoint=host
        )
    except HFValidationError as error:
        raise HubError(f"{file.repo!r} is no name of a hub repository", "give one like owner/name") from error
    with _explained(file, remedy):
        try:  # the library's own limit ends the thread; ours, which is the shorter, is told
            found = _within(within_s, lambda: get_hf_file_metadata(url, timeout=2 * within_s, endpoint=host))
        except concurrent.futures.TimeoutError as error:
            raise HubError(f"the hub did not answer within {within_s:g} s", remedy) from error
    commit, etag = found.commit_hash or "", found.etag or ""
    if not (_COMMIT.fullmatch(commit) and etag):
        raise HubError(f"{_shown_endpoint()} answers, but not as a hub does", remedy)
    return Located(file, url, commit, etag, found.size)


def fetch(
    file: HubFile,
    folder: Path,
    remedy: str = REMEDY,
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
    located = located or locate(file, remedy=remedy)
    wanted = file.sha256 or located.sha256
    if located.sha256 not in (None, wanted):
        raise _mismatch(file, located.sha256, wanted)
    path = _repo_folder(file, folder) / located.commit / file.file
    if path.is_file():
        return _checked(file, path, located.commit, progress)
    with _part_of(path, located) as part:
        with _explained(file, remedy):
            _download(located, part)
        found = file_sha256(Path(part.name), progress)
        if wanted not in (None, found):
            Path(part.name).unlink()
            raise _mismatch(file, found, wanted)
        Path(part.name).replace(path)
    return Fetched(file, path, located.commit, found)


def kept_copy(file: HubFile, folder: Path) -> tuple[Path, str] | None:
    """Path and commit of a copy on this machine that needs no question to the hub.

    A commit never changes. A branch may: its newest copy is the answer only where the hub
    is switched off.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    pinned = _COMMIT.fullmatch(file.revision)
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


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """The answer, or a `TimeoutError`. The thread is left behind: a name lookup cannot be stopped."""
    answer: concurrent.futures.Future[Answer] = concurrent.futures.Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except Exception as error:  # raised again where the answer is waited for
            answer.set_exception(error)

    threading.Thread(target=run, name="hub", daemon=True).start()
    return answer.result(timeout=seconds)


@contextlib.contextmanager
def _explained(file: HubFile, remedy: str) -> Iterator[None]:
    """The library's errors become a `HubError` of one line, which quotes neither header nor address."""
    from huggingface_hub import errors

    host, what = _shown_endpoint(), f"{file.repo}@{file.revision}"
    page = f"{host}/datasets/{file.repo}" if file.repo_type == "dataset" else f"{host}/{file.repo}"
    try:
        yield
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        reason, way_out = f"the hub answers with error {status}", f"try again later, or {remedy}"
        if isinstance(error, errors.GatedRepoError):
            reason = f"{what} wants its terms accepted"
            way_out = f"accept them at {page} and set HF_TOKEN to your token"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason, way_out = f"the hub has no revision {file.revision} of {file.repo}", f"see {page}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"the hub shows no repository {file.repo}"
            way_out = f"is it spelled as at {page}, or private: set HF_TOKEN"
        elif isinstance(error, errors.EntryNotFoundError):
            reason, way_out = f"{what} has no file {file.file}", f"see {page}/tree/{file.revision}"
        elif status == 401:
            reason, way_out = "the hub does not know the token it was given", "renew HF_TOKEN or log in again"
        elif status == 403:
            reason = f"the hub refuses {what}"
            way_out = f"accept the terms at {page}, or set HF_TOKEN to a token that may read it"
        raise HubError(reason, way_out) from error
    except (errors.HTTPError, ConnectionError) as error:  # the second where the library is offline
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise HubError(f"{host} cannot be reached: {reason}", remedy) from error
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise HubError(f"the download of {file.file} broke off", "start again, it will continue") from error


def _endpoint() -> str:
    """The hub's address: HF_ENDPOINT or the public one."""
    address = os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"
    try:
        parts = urllib.parse.urlsplit(address)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError("HF_ENDPOINT is no address of a hub; unset it, or give one such as https://host")
    return address


def _shown_endpoint() -> str:
    """The address without a name and a password that may stand in it."""
    parts = urllib.parse.urlsplit(_endpoint())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
