"""Asks the Hugging Face hub for a file: within a time limit, and with errors of one line.

`huggingface_hub` makes the requests, so HF_TOKEN, a cached login, HF_ENDPOINT, HF_HUB_OFFLINE
and proxies mean what they mean elsewhere; no token is ever printed. Nothing hangs: the
question runs in a thread of its own, name lookup included. Downloads nothing.

    located = locate(HubFile("zai-org/LongBench-v2", "data.json"), PROBE_S, "name a file instead")
    located.commit, located.num_bytes
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import re
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from typing import TypeVar

from dsatrace.errors import UserError
from dsatrace.workloads.catalog import HubFile

PROBE_S = 5.0  # how long the hub may take to say that it is there
ANSWER_S = 30.0  # the same where the user asked for the hub by name

Answer = TypeVar("Answer")

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TRUE = {"1", "true", "yes", "on"}


class HubError(UserError):
    """The hub does not give the file. `reason` is why, in a few words and without a remedy."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


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
        """What the hub says it is: large files go by it, small ones by git's own hash."""
        return self.etag if _SHA256.fullmatch(self.etag) else None


def hub_is_off() -> bool:
    """Whether the environment forbids the hub, by the library's own variables."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.lower() in _TRUE


def endpoint() -> str:
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


def locate(file: HubFile, within_s: float, remedy: str) -> Located:
    """Asks the hub for a file's metadata; raises `HubError` if it has not answered after `within_s`."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import build_hf_headers

    if hub_is_off():
        raise HubError("the hub is switched off by HF_HUB_OFFLINE", f"unset it, {remedy}")
    host = endpoint()
    try:
        url = hf_hub_url(
            file.repo, file.file, repo_type=file.repo_type, revision=file.revision, endpoint=host
        )
    except HFValidationError as error:
        raise HubError(f"{file.repo!r} is no name of a hub repository", "give one like owner/name") from error
    with explained(file, remedy):
        try:
            found = _within(
                within_s,
                lambda: get_hf_file_metadata(
                    url,
                    timeout=2 * within_s,  # ends the thread; the limit below is the one that is told
                    headers=build_hf_headers(),
                    endpoint=host,
                ),
            )
        except TimeoutError as error:
            raise HubError(f"the hub did not answer within {within_s:g} s", remedy) from error
    commit, etag = found.commit_hash or "", found.etag or ""
    if not (COMMIT.fullmatch(commit) and etag):
        raise HubError(f"{_shown_endpoint()} answers, but not as a hub does", remedy)
    return Located(file, url, commit, etag, found.size)


def _within(seconds: float, ask: Callable[[], Answer]) -> Answer:
    """The answer, or `TimeoutError`. The thread that asks is left behind: a name lookup cannot be stopped."""
    answers: queue.SimpleQueue[tuple[Answer | None, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            answers.put((ask(), None))
        except Exception as error:  # raised again where the answer is waited for
            answers.put((None, error))

    threading.Thread(target=run, name="hub", daemon=True).start()
    try:
        answer, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return answer  # type: ignore[return-value]  # without an error there is an answer


@contextlib.contextmanager
def explained(file: HubFile, remedy: str) -> Iterator[None]:
    """The library's errors become a `HubError` of one line, which quotes neither header nor address."""
    from huggingface_hub import errors

    what = f"{file.repo}@{file.revision}"
    page = f"{_shown_endpoint()}/{file.page}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise HubError(
            f"{what} wants its terms accepted", f"accept them at {page} and set HF_TOKEN to your token"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"the hub has no revision {file.revision} of {file.repo}", f"see {page}") from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"the hub shows no repository {file.repo}",
            f"is it spelled as at {page}, or private: set HF_TOKEN",
        ) from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"{what} has no file {file.file}", f"see {page}/tree/{file.revision}") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            reason = "the hub does not know the token it was given"
            raise HubError(reason, "renew HF_TOKEN or log in again") from error
        if status == 403:
            raise HubError(
                f"the hub refuses {what}",
                f"accept the terms at {page}, or set HF_TOKEN to a token that may read it",
            ) from error
        raise HubError(f"the hub answers with error {status}", f"try again later, or {remedy}") from error
    except (errors.HTTPError, ConnectionError) as error:  # the second where the library is offline
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise HubError(f"{_shown_endpoint()} cannot be reached: {reason}", remedy) from error
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise HubError(f"the download of {file.file} broke off", "start again, it will continue") from error


def _shown_endpoint() -> str:
    """The address without a name and a password that may stand in it."""
    parts = urllib.parse.urlsplit(endpoint())
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
