"""RULER rows to examples: NVIDIA's own, and the variants that allenai's archive carries.

`input` is the prompt wherever it is there: the qa rows have a short `question` beside it,
which alone would ask eight tokens of an empty context. Without it the prompt is made of
`context` and `query` or `question`, in our own words (texts.py). `index` is not unique and
is not used: an example's row is its place in its file.

    bad_rows = BadRows("skip")
    for example in read_examples(Path("data/ruler"), ["vt"], max_length=4096, bad_rows=bad_rows): ...
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from dsatrace.workloads.rows import BadRow, BadRows, read_rows, unicode_text
from dsatrace.workloads.ruler import texts
from dsatrace.workloads.ruler.example import TASKS, Example, Task, answer_spans
from dsatrace.workloads.ruler.files import RowFile, decode, numbered_lines, row_files


def read_examples(
    source: Path,
    tasks: Collection[str] = (),
    max_length: int | None = None,
    bad_rows: BadRows | None = None,
) -> Iterator[Example]:
    """Examples of a JSONL file, a folder or an archive, line by line.

    Raises `UserError` where nothing fits, for a file without one usable row, and for any
    bad row unless `bad_rows` skips them.
    """
    for file, stream in row_files(source, tasks, max_length):
        parse = functools.partial(_example, file)
        yield from read_rows(file.name, numbered_lines(stream, file.name), parse, bad_rows or BadRows())


def _example(file: RowFile, row: int, line: bytes) -> Example:
    record, task = decode(line), TASKS[file.task]
    prompt, answer_prefix = _given_prompt(record) or _composed_prompt(record, task)
    references = _references(record)
    return Example(
        task=task.name,
        row=row,
        prompt=prompt,
        answer_prefix=answer_prefix,
        references=references,
        tokens_to_generate=task.tokens_to_generate,
        metric=task.metric,
        max_length=file.max_length,
        length=_count(record, "length"),
        answer_spans=answer_spans(task.name, prompt, references),
    )


def _given_prompt(record: dict[str, Any]) -> texts.Parts | None:
    """`input` and `answer_prefix`; a prefix that `input` already ends in is taken off it."""
    prompt, answer_prefix = _text(record, "input"), _text(record, "answer_prefix")
    if not prompt.strip():
        return None
    if answer_prefix.strip() and prompt.rstrip().endswith(answer_prefix.strip()):
        end = len(prompt.rstrip()) - len(answer_prefix.strip())
        prompt = prompt[:end].rstrip(" ")
        if not prompt.strip():
            raise BadRow("empty text", "it holds the answer prefix alone", "input")
    return prompt, answer_prefix


def _composed_prompt(record: dict[str, Any], task: Task) -> texts.Parts:
    """The prompt of a row that brings its context and its question apart."""
    context, query, question = (_text(record, column) for column in ("context", "query", "question"))
    if not context.strip():
        raise BadRow("missing column", "and there is no input either", "context")
    if task.family in ("cwe", "fwe"):
        prompt, answer_prefix = texts.cwe(context) if task.family == "cwe" else texts.fwe(context)
    elif task.family == "qa" and (question or query):
        prompt, answer_prefix = texts.qa(context, question or query)
    elif task.family == "vt" and query:
        prompt, answer_prefix = texts.vt(context, query)
    elif task.family == "niah" and query:
        kind = _text(record, "type_needle_v").removesuffix("s") or task.value_kind
        plural = task.num_values * task.num_queries > 1
        prompt, answer_prefix = texts.niah(kind, context, query, plural)
    elif question:
        prompt, answer_prefix = f"{context}\n{question}", ""
    else:
        raise BadRow("missing column", "and there is no question either", "query")
    return _text(record, "example") + prompt, _text(record, "answer_prefix") or answer_prefix


def _references(record: dict[str, Any]) -> tuple[str, ...]:
    """`outputs`, or `answer`: one text or several, none of them empty, since "" is in every prediction."""
    column = "outputs" if record.get("outputs") is not None else "answer"
    value = record.get(column)
    if value is None:
        raise BadRow("missing column", "and there is no answer either", "outputs")
    items = value if isinstance(value, list) else [value]
    if not items or any(isinstance(item, bool) or not isinstance(item, str | int) for item in items):
        raise BadRow("not a text", "nor a list of at least one", column)
    references = tuple(unicode_text(str(item), column).strip() for item in items)
    if not all(references):
        raise BadRow("empty text", column=column)
    return references


def _text(record: dict[str, Any], column: str) -> str:
    """The column's text, "" where it is missing or null."""
    value = record.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow("not a text", f"it is of type {type(value).__name__}", column)
    return unicode_text(value, column)


def _count(record: dict[str, Any], column: str) -> int | None:
    value = record.get(column)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise BadRow("not a whole number", "or below 0", column)
    return value
