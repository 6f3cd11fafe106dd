"""RULER as requests: the prompt is the user's turn, the answer prefix is put into the model's mouth.

A model that thinks is asked without the prefix: its answer would begin inside the thoughts.
A score is 0 to 100 by the task's metric. Requests carry the token positions of the answer.

    RulerWorkload(generate("niah_single_1", 2048, tokenizer, 10), PromptSettings(chat)).requests()
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag, OpenedWorkload, PromptSettings, Workload
from dsatrace.workloads.encoding import Message
from dsatrace.workloads.exports import WholeFile, write_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRows, check_limit, read_rows
from dsatrace.workloads.ruler.example import TASKS, Example, locate, score, task_named
from dsatrace.workloads.ruler.generator import Sources, generate
from dsatrace.workloads.ruler.reader import decode, lines_of, read_examples, row_files

GENERATED_EXAMPLES, GENERATED_LENGTH, GENERATED_TASK = 10, 2048, "niah_single_1"


class RulerWorkload(Workload):
    """At most `limit` examples, and at most `limit_per_task` of each task and length."""

    name = "ruler"
    metric = "string match, 0 to 100"

    def __init__(
        self,
        examples: Iterable[Example],
        settings: PromptSettings,
        limit: int | None = None,
        bad_rows: BadRows | None = None,
        limit_per_task: int | None = None,
    ) -> None:
        super().__init__(bad_rows or BadRows())
        check_limit("--limit", limit)
        check_limit("--limit-per-task", limit_per_task)
        self._examples = examples
        self._settings = settings
        self._num_before_prompt, _ = settings.chat.frame()
        self._limit = limit
        self._limit_per_task = limit_per_task
        self._counts: Counter[tuple[str, int | None]] = Counter()
        self._open: dict[str, Example] = {}

    def requests(self) -> Iterator[Request]:
        for example in itertools.islice(self._chosen(), self._limit):
            request = self._request(example)
            self._open[request.request_id] = example
            yield request

    def _chosen(self) -> Iterator[Example]:
        for example in self._examples:
            kind = (example.task, example.max_length)
            if self._counts[kind] == self._limit_per_task:
                continue
            self._counts[kind] += 1
            yield example

    def _request(self, example: Example) -> Request:
        chat = self._settings.chat
        if example.answer_positions is None:
            example = locate(example, chat.tokenizer)
        prefix = "" if chat.thinking else example.answer_prefix
        labels = {"task": example.task}
        if example.max_length is not None:
            labels["length"] = str(example.max_length)
        places = sorted({position for place in example.answer_positions or () for position in place})
        return Request(
            request_id=".".join((*labels.values(), f"row{example.row}")),
            prompt_token_ids=tuple(chat.encode([Message("user", example.prompt)], prefix)),
            max_new_tokens=self._settings.most_new_tokens(example.tokens_to_generate, example.task),
            temperature=self._settings.temperature,
            source_row=example.row,
            labels=labels,
            needle_positions=tuple(position + self._num_before_prompt for position in places),
        )

    def judge(self, request_id: str, answer: str) -> float:
        return score(self._open[request_id], answer)

    def recorded(self, request: Request) -> tuple[int, ...]:
        """The references: what a perfect answer says."""
        references = self._open[request.request_id].references
        return self._settings.chat.as_generated(" " + ", ".join(references))

    def counts(self) -> dict[str, int]:
        by_task: Counter[str] = Counter()
        for (task, _), count in self._counts.items():
            by_task[task] += count
        return {"examples": by_task.total(), **{task: by_task[task] for task in sorted(by_task)}}


def open_ruler(args: argparse.Namespace, chat: Chat, find: Find) -> OpenedWorkload:
    """Rows of files if there are some, unless the generator or a text for it is asked for."""
    tasks = _tasks(args.ruler_task)
    bad_rows = BadRows(args.bad_rows)
    settings = PromptSettings.from_args(args, chat)
    generated = args.ruler_generate or args.haystack or args.squad or args.hotpotqa
    source = None if generated else find()
    if source is not None and source.path is not None:
        examples = read_examples(source.path, tasks, args.ruler_length, bad_rows)
        workload = RulerWorkload(examples, settings, args.limit, bad_rows, args.limit_per_task)
        return OpenedWorkload(workload, source.description, source.text(), chat_form=chat.form.name)
    haystack = f"haystack {args.haystack.name}" if args.haystack else "built-in texts"
    description = f"generator, seed {args.seed}, {haystack}"
    reason = "as asked" if source is None else source.reason
    tasks = tasks or (GENERATED_TASK,)
    for task in tasks:
        settings.most_new_tokens(TASKS[task].tokens_to_generate, task)
    spread = GENERATED_EXAMPLES if args.limit is None else -(-args.limit // len(tasks))
    per_task = args.limit_per_task or spread
    workload = RulerWorkload(
        _generated(args, tasks, per_task, chat), settings, args.limit, bad_rows, args.limit_per_task
    )
    num_requests = min(len(tasks) * per_task, args.limit or len(tasks) * per_task)
    terminal_line = f"ruler: {description} ({reason})"
    return OpenedWorkload(workload, description, terminal_line, num_requests, chat.form.name)


def _generated(
    args: argparse.Namespace, tasks: Sequence[str], num_examples: int, chat: Chat
) -> Iterator[Example]:
    sources = Sources(_text(args.haystack) if args.haystack else None, args.squad, args.hotpotqa)
    for task in tasks:
        yield from generate(
            task,
            args.ruler_length or GENERATED_LENGTH,
            chat.tokenizer,
            num_examples,
            args.seed,
            sources,
            overhead_tokens=sum(chat.frame()),
        )


def _tasks(named: Sequence[str] | None) -> tuple[str, ...]:
    """The tasks asked for, in order. `all` means every one."""
    names = [name.strip() for value in named or () for name in value.split(",")]
    if "all" in names:
        return tuple(TASKS)
    return tuple(dict.fromkeys(task_named(name).name for name in names))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--haystack {path}: cannot read it as UTF-8 text: {error}") from error


def _write_archive(archive: Path, folder: Path, limit: int | None) -> int:
    """The archive's row files under the names that the reader knows, up to `limit` rows in all.

    `row_files` refuses unsafe members.
    """
    num_rows = 0
    for file, stream in row_files(archive):
        if num_rows == limit:
            break
        target = folder / file.task / f"validation_{file.max_length}.jsonl"
        if file.max_length is None:
            target = target.with_name("validation.jsonl")
        if target.exists():
            raise UserError(
                f"{file.name}: the archive holds it twice; this is not RULER's archive, get another"
            )
        target.parent.mkdir(exist_ok=True)
        rows = read_rows(file.name, lines_of(stream, file.name), _json_line, WholeFile())
        left = None if limit is None else limit - num_rows
        num_rows += write_lines(target, itertools.islice(rows, left))
    return num_rows


def _json_line(row: int, line: bytes | None) -> bytes:
    decode(line)
    return (line or b"").rstrip(b"\r\n") + b"\n"


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
        Flag(
            "--ruler-task",
            "tasks, separated by commas, or all; may be repeated",
            action="append",
            metavar="TASK",
        ),
        Flag(
            "--ruler-length",
            f"length of prompt and answer (default: every length of the files, {GENERATED_LENGTH} generated)",
            type=int,
            metavar="TOKENS",
        ),
        Flag("--limit-per-task", "requests of each task and length; --limit counts them all", type=int),
        Flag("--ruler-path", "JSONL file, folder or archive, NVIDIA's or allenai's", type=Path),
        Flag("--ruler-generate", "generate the examples, even if there are files", action="store_true"),
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
