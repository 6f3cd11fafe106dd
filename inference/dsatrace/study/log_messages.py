"""Messages of OpenAI's interfaces, as speakers and texts: chat completions, and items of responses.

    messages, answer = chat({"messages": [{"role": "user", "content": "Hi"}]}, "messages", counts)
    said = items([{"type": "function_call", "name": "f", "arguments": "{}"}], "input", counts)
    answer = response_text({"response": {"choices": [{"message": {"content": "Hello"}}]}}, counts)

What is changed or left out is counted. No error quotes a text.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dsatrace.workloads.encoding import Message, Role
from dsatrace.workloads.rows import BadRow, text_value
from dsatrace.workloads.sharegpt import ROLES

Row = Mapping[str, Any]

PARTS_LEFT_OUT = "messages with parts that are no text (images, sound): those parts left out"
TOOL_ROLES = "messages of tools: taken for the user's"
TOOL_CALLS = "answers that call tools: the calls written out as JSON"
ITEMS_LEFT_OUT = "items that are no message and no tool's (reasoning, references): left out"
_OTHER_ROLES: dict[str, Role] = {"developer": "system", "tool": "user", "function": "user"}
_RESPONSES = ("response", "completion", "output", "answer")


def chat(row: Row, column: str, counts: Counter[str]) -> tuple[tuple[Message, ...], str]:
    """The messages up to the last that is not the model's, and what the model said after it.

    A row's own `system` comes first. Messages of one speaker in a row are joined by a blank line.
    """
    entries: list[tuple[Role, str]] = []
    if row.get("system"):
        entries.append(("system", _content(row["system"], counts)))
    if not isinstance(row[column], list):
        raise BadRow("not a list", f"it is of type {type(row[column]).__name__}", column)
    for i, entry in enumerate(row[column]):
        if not isinstance(entry, dict):
            raise BadRow("not an object", f"entry {i}", column)
        role, text = _message(i, entry, column, counts)
        calls = entry.get("tool_calls") or entry.get("function_call")
        if calls:
            counts[TOOL_CALLS] += 1
            text += json.dumps(calls, ensure_ascii=False)
        entries.append((role, text_value(text, column)))
    answers = len(list(itertools.takewhile(lambda entry: entry[0] == "assistant", reversed(entries))))
    asked, answered = entries[: len(entries) - answers], entries[len(entries) - answers :]
    if not any(text for _, text in asked):
        raise BadRow("no prompt", "the messages hold nothing but answers", column)
    return grouped(Message(*entry) for entry in asked), "\n\n".join(text for _, text in answered)


def _message(i: int, entry: Row, column: str, counts: Counter[str]) -> tuple[Role, str]:
    """Who says it, and the text."""
    speaker = entry.get("role", entry.get("from"))
    role = ROLES.get(speaker) or _OTHER_ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise BadRow("unknown role", f"entry {i}; known are {', '.join([*ROLES, *_OTHER_ROLES])}", column)
    counts[TOOL_ROLES] += speaker in ("tool", "function")
    return role, _content(entry.get("content", entry.get("value")), counts)


def grouped(messages: Iterable[Message]) -> tuple[Message, ...]:
    """Messages of one speaker in a row are joined by a blank line."""
    groups = itertools.groupby(messages, key=lambda message: message.role)
    return tuple(Message(role, "\n\n".join(each.content for each in group)) for role, group in groups)


def _content(value: object, counts: Counter[str]) -> str:
    """A message's text: a text, parts of which some are text, or nothing."""
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise BadRow("not a text", f"it is of type {type(value).__name__}", "content")
    texts = [
        part if isinstance(part, str) else part.get("text") for part in value if isinstance(part, str | dict)
    ]
    found = [text for text in texts if isinstance(text, str)]
    counts[PARTS_LEFT_OUT] += len(found) < len(value)
    return "\n".join(found)


def response_text(row: Row, counts: Counter[str]) -> str:
    """The answer: a text, a message, or what OpenAI's interface returns; empty if there is none."""
    value = next((row[column] for column in _RESPONSES if row.get(column)), None)
    if isinstance(value, dict) and isinstance(value.get("body"), dict):
        value = value["body"]  # of a batch
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        value = next(iter(value["choices"]), None)
    if isinstance(value, dict):
        value = value.get("message", value)
    if isinstance(value, dict):
        calls = value.get("tool_calls") or value.get("function_call")
        text = _content(value.get("content", value.get("text")), counts)
        counts[TOOL_CALLS] += bool(calls)
        return text_value(text + (json.dumps(calls, ensure_ascii=False) if calls else ""), "response")
    if isinstance(value, list):
        value = _content(value, counts)
    return text_value(value or "", "response")


def whole_answer(answer: str, response: str) -> str:
    """The whole answer: some logs repeat in the response what the messages end with."""
    return response if response.startswith(answer) else answer + response


def answer_of(row: Row) -> Row:
    """The response object beside a request, of a batch too; else the row, which may hold its columns."""
    response = row.get("response")
    if isinstance(response, dict) and isinstance(response.get("body"), dict):
        response = response["body"]
    return response if isinstance(response, dict) else row


def items(given: list[Any], column: str, counts: Counter[str]) -> list[tuple[Role, str]]:
    """What the items of an input or an output say, and who says it."""
    said: list[tuple[Role, str]] = []
    for i, item in enumerate(given):
        if not isinstance(item, dict):
            raise BadRow("not an object", f"entry {i}", column)
        kind = str(item.get("type") or "message")
        if kind == "message":
            said.append(_message(i, item, column, counts))
        elif kind.endswith("_call_output"):
            counts[TOOL_ROLES] += 1
            output = item.get("output")
            said.append(
                ("user", output if isinstance(output, str) else json.dumps(output, ensure_ascii=False))
            )
        elif kind.endswith("_call"):
            counts[TOOL_CALLS] += 1
            call = {key: item[key] for key in ("name", "arguments", "input", "action") if key in item}
            said.append(("assistant", json.dumps(call, ensure_ascii=False)))
        else:
            counts[ITEMS_LEFT_OUT] += 1
    return [(role, text_value(text, column)) for role, text in said]
