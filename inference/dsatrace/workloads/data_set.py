"""One data set as data: its flags, its hub file, its terms, and the functions that open and export it.

Each data set's own file fills one `DataSet`; `catalog.DATA_SETS` lists them. The runners
build their parsers from it, and `sources`, `exports` and `dsatrace download` read the rest.

    RULER = DataSet(name="ruler", title="RULER", hub=HubFile(...), flags=(Flag("--ruler-path", ...),), ...)
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request


@dataclasses.dataclass(frozen=True)
class Asking:
    """How every row of a data set is asked. None leaves the choice to the data set."""

    chat: Chat
    max_new_tokens: int | None = None
    temperature: float = 0.0
    max_prompt_tokens: int | None = None  # template included; only data sets that cut prompts look at it

    def __post_init__(self) -> None:
        for flag, value in (
            ("--max-new-tokens", self.max_new_tokens),
            ("--max-prompt-tokens", self.max_prompt_tokens),
        ):
            if value is not None and value < 1:
                raise UserError(f"{flag} {value}: use at least 1")

    @classmethod
    def of(cls, args: argparse.Namespace, chat: Chat) -> Asking:
        """As the flags of `run_dataset.py` say."""
        return cls(chat, args.max_new_tokens, args.temperature, args.max_prompt_tokens)


class Workload(Protocol):
    """One data set, read once, front to back.

    `requests` yields each request with an id of its own, the same ids in the same order at
    every reading, so that a run can be resumed. Raises `UserError` for a source that cannot be used.
    """

    @property
    def name(self) -> str: ...

    @property
    def metric(self) -> str | None:
        """What a score means; None where answers are not judged."""

    def requests(self) -> Iterator[Request]: ...

    def judge(self, request_id: str, answer: str) -> float | None:
        """The score of an answer's text, its thoughts cut off; None where there is none."""

    def recorded(self, request: Request) -> tuple[int, ...] | None:
        """The answer that the data set records, as `Chat.as_generated` has it, for runs without a model."""

    def forget(self, request_id: str) -> None:
        """Drops what is kept of a request (references, a recorded answer): it has ended."""

    def describe(self) -> dict[str, Any]:
        """Name, metric and counts of what has been read, for `summary.json`; no text of the data."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A workload, ready to be served.

    `description` is what the manifest says of its source, `said` what the terminal does.
    `num_requests` is None where it is not known before the rows have been read, `chat_form`
    where no messages are put together.
    """

    workload: Workload
    description: str
    said: str
    num_requests: int | None = None
    chat_form: str | None = None


Kind = Literal["file", "hub", "embedded", "generator"]


@dataclasses.dataclass(frozen=True)
class Source:
    """One data set's rows. `path` is a file, RULER's also a folder or archive; None for the generator.

    `description` goes into the manifest: it holds sha256 and names, no path of this machine.
    `reason` says why it is this one.
    """

    name: str
    kind: Kind
    path: Path | None
    description: str
    reason: str

    @property
    def file(self) -> Path:
        """The path of a source that is no generator."""
        assert self.path is not None, f"{self.name} comes from a generator"
        return self.path

    def text(self) -> str:
        """One line for the terminal."""
        return f"{self.name}: {self.description} ({self.reason})"


class Flag:
    """A command-line flag. `options` are those of `ArgumentParser.add_argument`."""

    def __init__(self, name: str, help: str, **options: Any) -> None:
        self.name = name
        self.help = help
        self.options = options

    @property
    def attribute(self) -> str:
        """Its name in the parsed arguments."""
        return attribute_of(self.name)

    def add_to(self, group: argparse._ArgumentGroup) -> None:
        """Adds it; its help tells a default that is a value."""
        told = " (default: %(default)s)" if "default" in self.options else ""
        group.add_argument(self.name, help=self.help + told, **self.options)


def attribute_of(flag: str) -> str:
    """`--ruler-path` -> `ruler_path`."""
    return flag.removeprefix("--").replace("-", "_")


class Find(Protocol):
    """Finds the rows of a data set: the named file, a hub repository `repo`, or what there is."""

    def __call__(self, repo: str | None = None) -> Source: ...


@dataclasses.dataclass(frozen=True)
class DataSet:
    """Everything that a runner, a download and an export know of one data set."""

    name: str
    title: str
    help: str  # in one line, what it is
    hub: HubFile
    licence: str
    flags: tuple[Flag, ...]
    file_flag: str  # which of the flags names a file of rows
    open: Callable[[argparse.Namespace, Chat, Find], Opened]
    write: Callable[[Path, Path, int | None], int]
    """Exports the first rows of a fetched file to a path, of RULER those of each file; returns how many."""
    export: str  # the exported file's name; {} is "" or "_limitN"
    patterns: tuple[str, ...]  # of the files that hold rows
    sample: str | None = None  # its name among the embedded ones; None: a generator stands in
    splits: tuple[str, ...] = ("train",)
    folders: tuple[str, ...] = ()  # rows lie in these folders, not in one file; `export` is "." then
    arrivals: bool = False  # requests arrive over time: served by run_burstgpt.py
    download_limit: int | None = None  # rows that are exported unless the user names a limit
    variable: str | None = None  # names the exported file to its script in scripts/

    def add_flags(self, parser: argparse.ArgumentParser) -> None:
        """Adds its flags, as a group of their own."""
        group = parser.add_argument_group(self.title, self.help)
        for flag in self.flags:
            flag.add_to(group)

    def hub_file(
        self, repo: str | None = None, file: str | None = None, revision: str | None = None
    ) -> HubFile:
        """The file on the hub; its sha256 is known if repository and file are the pinned ones.

        A revision that is named is taken as it is: so a pinned sha256 can be passed over.
        """
        pinned = self.hub
        same_repo = repo in (None, pinned.repo)
        same = same_repo and file in (None, pinned.file) and revision is None
        return dataclasses.replace(
            pinned,
            repo=repo or pinned.repo,
            file=file or pinned.file,
            revision=revision or (pinned.revision if same_repo else "main"),
            sha256=pinned.sha256 if same else None,
        )

    def remedy(self) -> str:
        """What else a user can do for the data, as the end of an error line."""
        return (
            f"download it with `dsatrace download {self.name}` on a machine that can, "
            f"or name a file with {self.file_flag}"
        )
