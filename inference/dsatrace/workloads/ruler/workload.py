"""RULER as requests: the prompt as the user's turn, the answer prefix in the model's mouth.

A model that thinks is asked without the prefix: its answer would begin inside the thoughts.

    workload = RulerWorkload(generate("niah_single_1", 2048, tokenizer, 10), Asking(chat))

An answer's score is 0 to 100 by its task's metric; its tokens' places in the prompt go with the request.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import Asking, DataSet, Find, Flag, Opened
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.exports import WholeFile, write_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit, read_rows
from dsatrace.workloads.ruler.example import TASKS, Example, locate, score, task_named
from dsatrace.workloads.ruler.generator import Sources, generate
from dsatrace.workloads.ruler.reader import decode, numbered_lines, read_examples, row_files

GENERATED_EXAMPLES = 10
GENERATED_LENGTH = 2048  # tokens
GENERATED_TASK = "niah_single_1"


class RulerWorkload:
    """At most `limit` examples of each task and length."""

    name = "ruler"
    metric = "string match, 0 to 100"

    def __init__(
        self,
        examples: Iterable[Example],
        asking: Asking,
        limit: int | None = None,
        bad_rows: BadRows | None = None,
    ) -> None:
        check_limit("--limit", limit)
        self._examples = examples
        self._asking = asking
        self._before_prompt, _ = asking.chat.frame()
        self._limit = limit
        self._bad_rows = bad_rows or BadRows()
        self._counts: Counter[tuple[str, int | None]] = Counter()
        self._open: dict[str, Example] = {}

    def requests(self) -> Iterator[Request]:
        for example in self._examples:
            kind = (example.task, example.max_length)
            if self._counts[kind] == self._limit:
                continue
            self._counts[kind] += 1
            request = self._request(example)
            self._open[request.request_id] = example
            yield request

    def judge(self, request_id: str, answer: str) -> float:
        return score(self._open[request_id], answer)

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The references: what a perfect answer says."""
        references = self._open[request.request_id].references
        return self._asking.chat.as_generated(" " + ", ".join(references))

    def forget(self, request_id: str) -> None:
        del self._open[request_id]

    def describe(self) -> dict[str, Any]:
        by_task: Counter[str] = Counter()
        for (task, _), count in self._counts.items():
            by_task[task] += count
        counts = {"examples": by_task.total(), **{task: by_task[task] for task in sorted(by_task)}}
        return {
            "name": self.name,
            "metric": self.metric,
            "counts": counts,
            "bad_rows": self._bad_rows.summary(),
        }

    def _request(self, example: Example) -> Request:
        chat = self._asking.chat
        if example.answer_positions is None:
            example = locate(example, chat.tokenizer)
        prefix = "" if chat.thinking else example.answer_prefix
        ids = chat.encode([Message("user", example.prompt)], prefix)
        places = sorted({p for place in example.answer_positions or () for p in place})
        length = "" if example.max_length is None else f".{example.max_length}"
        return Request(
            request_id=f"{example.task}{length}.row{example.row}",
            prompt_token_ids=tuple(ids),
            max_new_tokens=self._asking.max_new_tokens or example.tokens_to_generate,
            temperature=self._asking.temperature,
            source_row=example.row,
            labels={"task": example.task, **({"length": length[1:]} if length else {})},
            needle_positions=tuple(p + self._before_prompt for p in places),
        )


def open_ruler(args: argparse.Namespace, chat: Chat, find: Find) -> Opened:
    """Files where there are some; else, or when a text to generate from is named, the generator."""
    tasks = _tasks(args.ruler_task)
    bad_rows = BadRows(args.bad_rows)
    asking = Asking.of(args, chat)
    generated = args.ruler_generate or args.haystack or args.squad or args.hotpotqa
    source = None if generated else find()
    if source is not None and source.path is not None:
        examples = read_examples(source.path, tasks or (), args.ruler_length, bad_rows)
        workload = RulerWorkload(examples, asking, args.limit, bad_rows)
        return Opened(workload, source.description, source.text(), chat_form=chat.form.name)
    haystack = f"haystack {args.haystack.name}" if args.haystack else "built-in texts"
    description = f"generator, seed {args.seed}, {haystack}"
    reason = "as asked" if source is None else source.reason
    tasks = tasks or (GENERATED_TASK,)
    workload = RulerWorkload(_generated(args, tasks, chat), asking, None, bad_rows)
    num_requests = len(tasks) * (args.limit or GENERATED_EXAMPLES)
    return Opened(workload, description, f"ruler: {description} ({reason})", num_requests, chat.form.name)


def _generated(args: argparse.Namespace, tasks: Sequence[str], chat: Chat) -> Iterator[Example]:
    sources = Sources(_text(args.haystack) if args.haystack else None, args.squad, args.hotpotqa)
    for task in tasks:
        yield from generate(
            task,
            args.ruler_length or GENERATED_LENGTH,
            chat.tokenizer,
            args.limit or GENERATED_EXAMPLES,
            args.seed,
            sources,
            overhead_tokens=sum(chat.frame()),
        )


def _tasks(named: Sequence[str] | None) -> tuple[str, ...] | None:
    """The tasks asked for, in order; None when none was. `all` means every one."""
    if not named:
        return None
    names = [name.strip() for value in named for name in value.split(",")]
    if "all" in names:
        return tuple(TASKS)
    return tuple(dict.fromkeys(task_named(name).name for name in names))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path}: cannot read it as UTF-8 text: {error}") from error


def _write_archive(archive: Path, folder: Path, limit: int | None) -> int:
    """The archive's row files under the names that its reader knows; `row_files` refuses unsafe members."""
    num_rows = 0
    for file, stream in row_files(archive):
        target = folder / file.task / f"validation_{file.max_length}.jsonl"
        if file.max_length is None:
            target = target.with_name("validation.jsonl")
        if target.exists():
            raise UserError(
                f"{file.name}: the archive holds it twice; this is not RULER's archive, get another"
            )
        target.parent.mkdir(exist_ok=True)
        rows = read_rows(file.name, numbered_lines(stream, file.name), _json_line, WholeFile())
        num_rows += write_lines(target, itertools.islice(rows, limit))
    return num_rows


def _json_line(row: int, line: bytes) -> bytes:
    decode(line)
    return line.rstrip(b"\r\n") + b"\n"


RULER = DataSet(
    name="ruler",
    title="RULER",
    help="13 synthetic tasks whose answer is hidden in a long context",
    hub=HubFile(
        repo="allenai/ruler_data",
        file="data_100_samples.tgz",
        revision="b2d1d948dc4f6ca37c0135123f3b3afbed741130",
        sha256="a8da67ff3a7e6866a8012b81c79084f763111be54bd3a44e86eb18a377eb53c3",
    ),
    licence="the generator is Apache-2.0; qa rows hold SQuAD 2.0 and HotpotQA text (CC-BY-SA-4.0), "
    "essay rows Paul Graham's essays (no open licence)",
    flags=(
        Flag("--ruler-task", "one or several, or all; may be repeated", action="append", metavar="TASK"),
        Flag(
            "--ruler-length",
            f"prompt and answer (default: every length of the files, {GENERATED_LENGTH} generated)",
            type=int,
            metavar="TOKENS",
        ),
        Flag("--ruler-path", "JSONL file, folder or archive, NVIDIA's or allenai's", type=Path),
        Flag("--ruler-generate", "make the examples, whatever files are there", action="store_true"),
        Flag("--haystack", "text to generate the essay tasks from", type=Path),
        Flag("--squad", "SQuAD 2.0's dev-v2.0.json, to generate qa_1", type=Path),
        Flag("--hotpotqa", "hotpot_dev_distractor_v1.json, to generate qa_2", type=Path),
    ),
    file_flag="--ruler-path",
    open=open_ruler,
    write=_write_archive,
    export=".",
    patterns=("*.jsonl",),
    splits=("train", "validation"),  # the hub calls the only one train, RULER's files validation
    folders=tuple(TASKS),
)
