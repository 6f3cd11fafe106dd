"""Files from the Hugging Face hub: found within a time limit, kept, and checked by their sha256.

`huggingface_hub` makes the requests, so HF_TOKEN, a cached login, HF_ENDPOINT, HF_HUB_OFFLINE
and proxies mean what they mean elsewhere, and what its cache holds is used. What it does not
do is done here: it may wait without end, its errors take many lines, and it deletes an
unfinished file when its process ends, where a download here continues.

Downloads lie in `<folder>/<owner>--<name>/<commit>/<file>`, unfinished ones beside it as `.part`.

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
from dsatrace.units import size_text
from dsatrace.workloads.digests import Progress, file_sha256, no_progress

PROBE_S = 5.0  # how long the hub may take to answer a run, which says so and ends or takes other rows
ANSWER_S = 30.0  # the same for a download

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")

Answer = TypeVar("Answer")


class HubError(UserError):
    """The hub does not give the file. `reason` is why, in a few words and without a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class HubFile:
    """One file of a hub repository. `sha256` is what its bytes must have; None: any bytes are taken."""

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
    """Where a file lies on this machine, now or after `download`. The rest is the hub's answer.

    `url` is None for a copy that needs no question to the hub.
    """

    file: HubFile
    path: Path
    commit: str
    url: str | None = None
    etag: str = ""
    num_bytes: int | None = None

    @property
    def sha256(self) -> str | None:
        """The hub's sha256 of the file; it names one for large files only."""
        return self.etag if _SHA256.fullmatch(self.etag) else None

    def text(self) -> str:
        size = "" if self.num_bytes is None else f", {size_text(self.num_bytes)}"
        return f"{self.file.repo}@{self.commit} {self.file.file}{size}"


@dataclasses.dataclass(frozen=True)
class Fetched:
    """A file that lies on this machine, and the sha256 of its bytes."""

    file: HubFile
    path: Path
    commit: str
    sha256: str

    def text(self) -> str:
        return f"{self.file.repo}@{self.commit} {self.file.file} sha256:{self.sha256}"


def default_data_folder() -> Path:
    """DSATRACE_DATA, else `data/` of the checkout, else `data/` of the working directory."""
    if os.environ.get("DSATRACE_DATA"):
        return Path(os.environ["DSATRACE_DATA"])
    root = Path(__file__).resolve().parents[3]
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "data"


def hub_is_off() -> bool:
    """Whether the environment forbids the hub, by the library's own variables."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in {"1", "true", "yes", "on"}


def fetch(file: HubFile, folder: Path, remedy: str) -> Fetched:
    """The file from the library's cache, from `folder` or from the hub, in that order.

    Raises what `locate` and `download` raise.
    """
    return download(locate(file, folder, remedy), remedy)


def locate(file: HubFile, folder: Path, remedy: str, within_s: float = ANSWER_S) -> Located:
    """A copy on this machine, else what the hub says of the file.

    Raises `HubError` if the hub refuses or has not answered after `within_s`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        kept = _kept_copy(file, folder)
        if kept:
            return kept
        if hub_is_off():
            raise HubError("the hub is switched off by HF_HUB_OFFLINE", f"unset it, {remedy}")
        host = _endpoint()
        url = hf_hub_url(
            file.repo, file.file, repo_type=file.repo_type, revision=file.revision, endpoint=host
        )
    except HFValidationError as error:
        raise HubError(f"{file.repo!r} is no name of a hub repository", "give one like owner/name") from error
    with _errors_in_one_line(file, remedy):
        try:  # the library's longer limit only ends the thread
            found = _within(within_s, lambda: get_hf_file_metadata(url, timeout=2 * within_s, endpoint=host))
        except concurrent.futures.TimeoutError as error:
            raise HubError(f"the hub did not answer within {within_s:g} s", remedy) from error
    commit, etag = found.commit_hash or "", found.etag or ""
    if not (_COMMIT.fullmatch(commit) and etag):
        raise HubError(f"{_shown_endpoint()} answers, but not as a hub does", remedy)
    return Located(file, _repo_folder(file, folder) / commit / file.file, commit, url, etag, found.size)


def _kept_copy(file: HubFile, folder: Path) -> Located | None:
    """A copy that needs no question to the hub.

    A commit never changes. A branch may: its newest copy is taken only where the hub is off.
    """
    from huggingface_hub import try_to_load_from_cache

    is_commit = _COMMIT.fullmatch(file.revision)
    if not (is_commit or hub_is_off()):
        return None
    cached = try_to_load_from_cache(file.repo, file.file, revision=file.revision, repo_type=file.repo_type)
    if isinstance(cached, str):
        return Located(file, Path(cached), Path(cached.removesuffix(f"/{file.file}")).name)
    base = _repo_folder(file, folder)
    copies = base.glob(f"{file.revision if is_commit else '*'}/{file.file}")
    newest = max(copies, key=lambda path: path.stat().st_mtime, default=None)
    return None if newest is None else Located(file, newest, newest.relative_to(base).parts[0])


def _repo_folder(file: HubFile, folder: Path) -> Path:
    return folder / file.repo.replace("/", "--")


def download(located: Located, remedy: str, progress: Progress = no_progress) -> Fetched:
    """Downloads the file unless it is here, and checks its bytes; `progress` shows the checking.

    Raises `HubError` if the hub breaks off, and `UserError` for bytes that are not those of
    `file.sha256` and for a full disk. A download that breaks off is continued the next time.
    """
    file, path = located.file, located.path
    wanted = file.sha256 or located.sha256
    if located.sha256 not in (None, wanted):
        raise _mismatch(file, located.sha256, wanted)
    if path.is_file():
        found = file_sha256(path, progress)
        if file.sha256 not in (None, found):
            raise UserError(
                f"{path}: its sha256 is {found}, that of {file.repo} {file.file} is {file.sha256}; "
                "delete it and fetch it again"
            )
        return Fetched(file, path, located.commit, found)
    with _open_part(located) as part:
        with _errors_in_one_line(file, remedy):
            _fill(part, located)
        found = file_sha256(Path(part.name), progress)
        if wanted not in (None, found):
            Path(part.name).unlink()
            raise _mismatch(file, found, wanted)
        Path(part.name).replace(path)
    return Fetched(file, path, located.commit, found)


def _mismatch(file: HubFile, found: str | None, wanted: str | None) -> UserError:
    return UserError(
        f"{file.repo}@{file.revision} {file.file}: its sha256 is {found}, not {wanted}; "
        "fetch it again, or take what the hub has with --revision"
    )


@contextlib.contextmanager
def _open_part(located: Located) -> Iterator[BinaryIO]:
    """The unfinished file, open at its end and locked. Its name tells the content: it may change on the hub.

    A disk that does not take the file becomes a `UserError`.
    """
    content = re.sub(r"[^0-9A-Za-z]", "", located.etag)[:16]
    part = located.path.with_name(f"{located.path.name}.{content}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{part}: another process is downloading it; wait for that one") from error
            yield file
    except OSError as error:
        size = "the file" if located.num_bytes is None else size_text(located.num_bytes)
        raise UserError(
            f"{part.parent}: cannot write {size}: {error.strerror or error}; "
            "make room and start again, the download will continue"
        ) from error


def _fill(part: BinaryIO, located: Located) -> None:
    """Appends what is missing. Raises the library's errors and the disk's."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    size = located.num_bytes
    if size is not None and part.tell() > size:
        part.truncate(0)
        part.seek(0)
    if size is not None and shutil.disk_usage(Path(part.name).parent).free < size - part.tell():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # the library only warns
    http_get(
        str(located.url),
        part,
        resume_size=part.tell(),
        headers={**build_hf_headers(), "Accept-Encoding": "identity"},  # ranges count the file's own bytes
        expected_size=size,
        displayed_filename=located.path.name,
    )
    part.flush()


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
def _errors_in_one_line(file: HubFile, remedy: str) -> Iterator[None]:
    """The library's errors become a `HubError`, which quotes neither a header nor a password."""
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
            way_out = f"accept them at {page}, then log in with `hf auth login` or set HF_TOKEN"
        elif isinstance(error, errors.RevisionNotFoundError):
            reason, way_out = f"the hub has no revision {file.revision} of {file.repo}", f"see {page}"
        elif isinstance(error, errors.RepositoryNotFoundError):
            reason = f"the hub shows no repository {file.repo}"
            way_out = f"is it spelled as at {page}? If it is private, log in with `hf auth login`"
        elif isinstance(error, errors.EntryNotFoundError):
            reason, way_out = f"{what} has no file {file.file}", f"see {page}/tree/{file.revision}"
        elif status == 401:
            reason, way_out = (
                "the hub does not know the token it was given",
                "renew HF_TOKEN, or log in with `hf auth login`",
            )
        elif status == 403:
            reason = f"the hub refuses {what}"
            way_out = f"accept the terms at {page}, and log in with `hf auth login` as one who may read it"
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
