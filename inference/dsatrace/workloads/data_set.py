"""What a data set is: its entry in the table, the rows found for it, and the workload they become.

Each data set's own file ends with its `DataSet`; `catalog.DATA_SETS` lists them. The runners
build their parsers from it; `sources`, `exports` and `dsatrace download` read the rest.

    opened = DATA_SETS["ruler"].open(args, chat, find)
    for request in opened.workload.requests():
        score = opened.workload.judge(request.request_id, answer_text)
        opened.workload.forget(request.request_id)
"""

from __future__ import annotations

import abc
import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows


@dataclasses.dataclass(frozen=True)
class PromptSettings:
    """How each row becomes a request. None: the data set decides."""

    chat: Chat
    max_new_tokens: int | None = None
    temperature: float = 0.0
    min_new_tokens: int = 0
    max_prompt_tokens: int | None = None  # chat template included; for data sets that cut prompts

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} {value}: use at least 1")

    @classmethod
    def from_args(cls, args: argparse.Namespace, chat: Chat) -> PromptSettings:
        least, most = args.min_new_tokens, args.max_new_tokens
        return cls(chat, most, args.temperature, least, args.max_prompt_tokens)

    def most_new_tokens(self, own: int, of: str) -> int:
        """`max_new_tokens`, else the data set's `own`; a `UserError` where `min_new_tokens` is above that.

        `of` names whose own it is: a data set, or one of its tasks.
        """
        most = self.max_new_tokens or own
        if self.min_new_tokens > most:
            raise UserError(
                f"--min-new-tokens {self.min_new_tokens} is above the {most} new tokens of {of}; give "
                f"--max-new-tokens {self.min_new_tokens} or more"
            )
        return most


class Workload(abc.ABC):
    """A data set as requests, read once from front to back.

    A subclass keeps in `_open` what it needs of a request until `forget`.
    """

    name: str
    metric: str | None = None  # what a score means; None: answers are not judged

    def __init__(self, bad_rows: BadRows) -> None:
        self._bad_rows = bad_rows
        self._open: dict[str, Any] = {}  # by request id

    @abc.abstractmethod
    def requests(self) -> Iterator[Request]:
        """The same ids in the same order at every reading, so that a run can be resumed.

        Raises `UserError` for rows that cannot be used.
        """

    def judge(self, request_id: str, answer: str) -> float | None:
        """The score of an answer's text without its thoughts; None where answers are not judged."""
        return None

    @abc.abstractmethod
    def recorded(self, request: Request) -> tuple[int, ...] | None:
        """The recorded answer's ids, for runs without a model; None if the data set has none."""

    def forget(self, request_id: str) -> None:
        """Called when a request has ended: frees its references or its recorded answer."""
        self._open.pop(request_id, None)

    @abc.abstractmethod
    def counts(self) -> dict[str, int]:
        """What has been read so far."""

    def details(self) -> dict[str, Any]:
        """What else `summary.json` says of the workload."""
        return {}

    def describe(self) -> dict[str, Any]:
        """The section `workload` of `summary.json`; holds no text of the data."""
        return {
            "name": self.name,
            "metric": self.metric,
            **self.details(),
            "counts": self.counts(),
            "bad_rows": self._bad_rows.summary(),
        }


@dataclasses.dataclass(frozen=True)
class OpenedWorkload:
    """A workload ready to be served."""

    workload: Workload
    description: str  # of its source, for the manifest
    terminal_line: str  # the same for the terminal
    num_requests: int | None = None  # None: not known before all rows are read
    chat_form: str | None = None  # None: prompts are not made of messages


@dataclasses.dataclass(frozen=True)
class Source:
    """Where one data set's rows come from in this run, and why.

    `path` is a file, for RULER also a folder or archive; None for the generator. `description`
    goes into the manifest: names and sha256, no path of this machine.
    """

    name: str
    path: Path | None
    description: str
    reason: str

    @property
    def file(self) -> Path:
        """The path, for a data set without a generator."""
        assert self.path is not None, f"{self.name} comes from a generator"
        return self.path

    def text(self) -> str:
        """One line for the terminal."""
        return f"{self.name}: {self.description} ({self.reason})"


class Find(Protocol):
    """Finds the rows: in the file its flag names, in the hub repository `repo`, or where there are any."""

    def __call__(self, repo: str | None = None) -> Source: ...


class Flag:
    """A command-line flag; `options` are those of `ArgumentParser.add_argument`."""

    def __init__(self, name: str, help: str, **options: Any) -> None:
        self.name = name
        self.options = {"help": help, **options}
        self.attribute = attribute_of(name)


def attribute_of(flag: str) -> str:
    """A flag's name in the parsed arguments: `--ruler-path` -> `ruler_path`."""
    return flag.removeprefix("--").replace("-", "_")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Everything that a runner, a download and an export know of one data set."""

    name: str
    title: str
    help: str
    hub: HubFile
    licence: str
    flags: tuple[Flag, ...]
    file_flag: str  # which of the flags names a file of rows
    open: Callable[[argparse.Namespace, Chat, Find], OpenedWorkload]
    write: Callable[[Path, Path, int | None], int]
    """Writes the first rows of a fetched file to a path; returns how many."""
    export: str  # the exported file's name; {} becomes "" or "_limitN"
    patterns: tuple[str, ...]  # of the files that hold rows
    sample: str | None = None  # its embedded sample; None: a generator stands in
    splits: tuple[str, ...] = ("train",)
    folders: tuple[str, ...] = ()  # the rows lie in these folders, not in one file; `export` is "." then
    arrivals: bool = False  # requests arrive over time: served by run_burstgpt.py
    download_limit: int | None = None  # rows exported unless the user names a limit
    variable: str | None = None  # environment variable that names the exported file to its script

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds its flags as a group."""
        group = parser.add_argument_group(self.title, self.help)
        for flag in self.flags:
            group.add_argument(flag.name, **flag.options)

    def hub_file(
        self, repo: str | None = None, file: str | None = None, revision: str | None = None
    ) -> HubFile:
        """The file on the hub. Its sha256 is checked only if nothing is named that is not pinned."""
        pinned = self.hub
        same_repo = repo in (None, pinned.repo)
        is_pinned = same_repo and file in (None, pinned.file) and revision is None
        return dataclasses.replace(
            pinned,
            repo=repo or pinned.repo,
            file=file or pinned.file,
            revision=revision or (pinned.revision if same_repo else "main"),
            sha256=pinned.sha256 if is_pinned else None,
        )

    def remedy(self) -> str:
        """How else a user can get the data: the end of an error line."""
        return (
            f"download it with `dsatrace download {self.name}` on a machine that can, "
            f"or name a file with {self.file_flag}"
        )
