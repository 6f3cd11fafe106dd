"""Layouts of the logs that services write: how each is recognised, and how a row becomes a request.

One table, `LAYOUTS`; its order is that of recognition. A layout's `read` gives the prompt as text, as
messages or as token ids, the answer if there is one, and leaves the time to `Times`. Opens no file.

    layout = layout_of({"messages": [], "timestamp": 0})      # LAYOUTS["messages"]
    layout.read(row, counts).prompt
"""

from __future__ import annotations

import ast
import dataclasses
import datetime
import itertools
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from dsatrace.errors import UserError
from dsatrace.workloads.encoding import Message, Role
from dsatrace.workloads.id_logs import id_array
from dsatrace.workloads.rows import BadRow, text_value
from dsatrace.workloads.sharegpt import ROLES
from dsatrace.workloads.trace_rows import count_column, id_column

Row = Mapping[str, Any]

PARTS_LEFT_OUT = "messages with parts that are no text (images, sound): those parts left out"
TOOL_ROLES = "messages of tools: taken for the user's"
TOOL_CALLS = "answers that call tools: the calls written out as JSON"
NOT_FINISHED = "rows about requests that had no answer yet: left out, since another row has both"
_OTHER_ROLES: dict[str, Role] = {"developer": "system", "tool": "user", "function": "user"}
_TIMES = ("timestamp", "time", "created", "created_at", "created_time", "start_time", "startTime")
_CONVERSATIONS = ("conversation_id", "session_id", "chat_id", "thread_id")
_RESPONSES = ("response", "completion", "output", "answer")
_UNUSED = ("tools", "functions", "cache_salt", "lora_request")  # what changes or parts real prefixes


@dataclasses.dataclass(frozen=True)
class LoggedRequest:
    """A request as its row tells it. `conversation_id` is empty and `turn` -1 where the row does not tell."""

    prompt: str | tuple[Message, ...] | array[int]
    answer: str | array[int]  # ids beside a prompt of ids
    conversation_id: str = ""
    turn: int = -1


@dataclasses.dataclass(frozen=True)
class Layout:
    """`fits` recognises a row. `read` gives None for a row that is no request of its own, and counts it.

    Conversations and block ids have readers of their own, and no `read`.
    """

    name: str
    about: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Counter[str]], LoggedRequest | None] | None
    times: tuple[str, ...] = _TIMES  # the first that a row has is its time
    time_unit: str | None = None  # None: told by the number's size, or by a flag
    unused: tuple[str, ...] = _UNUSED  # columns that are known, and counted where they hold anything
    recorded: bool = True  # whether times are where no column `arrivals` says so: a simulator's are drawn


def layout_of(row: Row) -> Layout | None:
    """The layout of a row, None if none fits."""
    return next((layout for layout in LAYOUTS.values() if layout.fits(row)), None)


def _read_messages(row: Row, counts: Counter[str]) -> LoggedRequest:
    messages, answer = _chat(row, "messages", counts)
    return LoggedRequest(messages, _said(answer, _response(row, counts)), *_conversation(row))


def _read_prompt(row: Row, counts: Counter[str]) -> LoggedRequest:
    if isinstance(row["prompt"], list):
        messages, answer = _chat(row, "prompt", counts)
        return LoggedRequest(messages, _said(answer, _response(row, counts)), *_conversation(row))
    prompt = text_value(row["prompt"], "prompt")
    return LoggedRequest(_filled(prompt, "prompt"), _response(row, counts), *_conversation(row))


def _read_pair(row: Row, counts: Counter[str]) -> LoggedRequest:
    column = "request" if "request" in row else "body"
    inner = row[column]
    if not isinstance(inner, dict):
        raise BadRow("not an object", f"it is of type {type(inner).__name__}", column)
    read = _read_messages if "messages" in inner else _read_prompt
    if "messages" not in inner and "prompt" not in inner:
        raise BadRow("missing column", "neither messages nor prompt", column)
    request = read({key: inner[key] for key in ("messages", "prompt", "system") if key in inner}, counts)
    _count_unused(inner, _UNUSED, counts)
    conversation, turn = _conversation({**inner, **row})
    answer = _said(str(request.answer), _response(row, counts))
    return dataclasses.replace(request, answer=answer, conversation_id=conversation, turn=turn)


def _read_litellm(row: Row, counts: Counter[str]) -> LoggedRequest:
    """Prompts stand in `messages`, or in `proxy_server_request`; both may be JSON as text, or empty."""
    sources = (_unpacked(row.get("messages")), _unpacked(row.get("proxy_server_request")))
    for source in sources:
        messages = source.get("messages") if isinstance(source, dict) else source
        if isinstance(messages, list) and messages:
            response = {"response": _unpacked(row.get("response"))}
            chat, answer = _chat({**row, "messages": messages}, "messages", counts)
            return LoggedRequest(chat, _said(answer, _response(response, counts)), *_conversation(row))
    raise BadRow("no prompt", "LiteLLM keeps prompts if store_prompts_in_spend_logs is on", "messages")


def _read_sglang(row: Row, counts: Counter[str]) -> LoggedRequest | None:
    """Ids if they were dumped, else text. Of SGLang's request log only the finished requests."""
    obj, out = row["obj"], row.get("out") or {}
    if str(row.get("event", "")).endswith("received"):
        counts[NOT_FINISHED] += 1
        return None
    if not isinstance(obj, dict) or not isinstance(out, dict):
        raise BadRow("not an object", "requests of a batch must be rows of their own", "obj")
    conversation = _conversation({"session_id": _session(obj)})
    if obj.get("input_ids") is not None:
        prompt_ids = id_array(obj, "input_ids", "i")
        if not prompt_ids:
            raise BadRow("empty prompt", column="input_ids")
        answer_ids = id_array(out, "output_ids", "i") if out.get("output_ids") else array("i")
        return LoggedRequest(prompt_ids, answer_ids, *conversation)
    prompt = _filled(text_value(obj.get("text"), "text"), "text")
    return LoggedRequest(prompt, text_value(out.get("text") or "", "text"), *conversation)


def _session(obj: Row) -> object:
    session = obj.get("session_params") or {}
    return session.get("id") if isinstance(session, dict) else None


def _read_tokens(row: Row, counts: Counter[str]) -> LoggedRequest:
    prompt_ids = id_array(row, "input_tok_ids", "i")
    if not prompt_ids:
        raise BadRow("empty prompt", column="input_tok_ids")
    answer_ids = id_array(row, "output_tok_ids", "i") if "output_tok_ids" in row else array("i")
    return LoggedRequest(prompt_ids, answer_ids, *_conversation(row))


VLLM_LINE = re.compile(
    r"(?:(?P<time>\d\d-\d\d \d\d:\d\d:\d\d)[^\]]*\] )?"
    r"(?:Received request \S+?: prompt: |Request \S+ details: prompt: )"
    r"(?P<prompt>'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"|None), "
    r"(?:.*?prompt_token_ids: (?P<ids>\[[0-9, ]*\]|None))?"
)


def vllm_row(line: str) -> dict[str, Any] | None:
    """Time, prompt and ids of a line of vLLM's log, None for a line that holds no prompt.

    Its times have no year, so a log must not go on past the end of one.
    """
    match = VLLM_LINE.search(line)
    if match is None:
        return None
    try:
        prompt = ast.literal_eval(match["prompt"])
        time = match["time"] and f"2000-{match['time']}+00:00"
    except (ValueError, SyntaxError) as error:
        raise BadRow("not a quoted text", column="prompt") from error
    return {"time": time, "text": prompt, "ids": json.loads(match["ids"] or "null")}


def _read_vllm(row: Row, counts: Counter[str]) -> LoggedRequest:
    """Text first: what --max-log-len leaves of the ids may be shorter."""
    if row["text"]:
        return LoggedRequest(text_value(row["text"], "prompt"), "")
    if not row["ids"]:
        raise BadRow("empty prompt", column="prompt")
    return LoggedRequest(id_array(row, "ids", "i"), array("i"))


def _is_list(*columns: str) -> Callable[[Row], bool]:
    return lambda row: any(isinstance(row.get(column), list) for column in columns)


def _has(*columns: str) -> Callable[[Row], bool]:
    return lambda row: all(column in row for column in columns)


SHAREGPT, MOONCAKE, BAILIAN, VLLM = "sharegpt", "mooncake", "bailian", "vllm"
LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("bailian", "block ids with chat_id", _has("hash_ids", "chat_id"), None),
        Layout("mooncake", "block ids", _has("hash_ids"), None),
        Layout(
            "tokens",
            "input_tok_ids",
            _has("input_tok_ids"),
            _read_tokens,
            ("arrival_time_ns",),
            "ns",
            recorded=False,
        ),
        Layout("sharegpt", "conversations of from/value or role/content", _is_list("conversations"), None),
        Layout(
            "litellm",
            "LiteLLM's spend logs",
            lambda row: "messages" in row and bool({"call_type", "spend", "startTime"} & row.keys()),
            _read_litellm,
            ("startTime", "start_time"),
        ),
        Layout("messages", "messages, response beside them or last", _is_list("messages"), _read_messages),
        Layout(
            "pairs",
            "request (or body) with messages or a prompt, and response",
            lambda row: isinstance(row.get("request", row.get("body")), dict),
            _read_pair,
        ),
        Layout(
            "sglang",
            "SGLang's dumps and request log: obj and out",
            lambda row: isinstance(row.get("obj"), dict),
            _read_sglang,
        ),
        Layout(
            "prompt",
            "prompt, a text or messages, and response",
            lambda row: isinstance(row.get("prompt"), str | list),
            _read_prompt,
            time_unit="s",
        ),
        Layout("vllm", "lines of vLLM's text log with prompts", lambda row: False, _read_vllm, ("time",)),
    )
}  # fmt: skip


def read_row(layout: Layout, row: Row, counts: Counter[str]) -> LoggedRequest | None:
    """`layout.read`, with columns counted that it leaves unused. A row that does not fit is bad."""
    assert layout.read is not None
    if layout.name != VLLM and not layout.fits(row):
        raise BadRow("not the layout's columns", f"{layout.name} means {layout.about}")
    request = layout.read(row, counts)
    _count_unused(row, layout.unused, counts)
    return request


def _count_unused(row: Row, columns: tuple[str, ...], counts: Counter[str]) -> None:
    for column in columns:
        if row.get(column):
            counts[f"rows with {column}, which is not part of the prompt here"] += 1


def _chat(row: Row, column: str, counts: Counter[str]) -> tuple[tuple[Message, ...], str]:
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
        speaker = entry.get("role", entry.get("from"))
        role = ROLES.get(speaker) or _OTHER_ROLES.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            raise BadRow("unknown role", f"entry {i}; known are {', '.join([*ROLES, *_OTHER_ROLES])}", column)
        counts[TOOL_ROLES] += speaker in ("tool", "function")
        text = _content(entry.get("content", entry.get("value")), counts)
        calls = entry.get("tool_calls") or entry.get("function_call")
        if calls:
            counts[TOOL_CALLS] += 1
            text += json.dumps(calls, ensure_ascii=False)
        entries.append((role, text_value(text, column)))
    answers = len(list(itertools.takewhile(lambda entry: entry[0] == "assistant", reversed(entries))))
    asked, answered = entries[: len(entries) - answers], entries[len(entries) - answers :]
    if not any(text for _, text in asked):
        raise BadRow("no prompt", "the messages hold nothing but answers", column)
    groups = itertools.groupby(asked, key=lambda entry: entry[0])
    messages = tuple(Message(role, "\n\n".join(text for _, text in group)) for role, group in groups)
    return messages, "\n\n".join(text for _, text in answered)


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


def _response(row: Row, counts: Counter[str]) -> str:
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


def _said(answer: str, response: str) -> str:
    """The whole answer: some logs repeat in the response what the messages end with."""
    return response if response.startswith(answer) else answer + response


def _conversation(row: Row) -> tuple[str, int]:
    """Its id and turn, where the row has them."""
    column = next((name for name in _CONVERSATIONS if row.get(name) not in (None, "")), None)
    turn = count_column(row, "turn_index") if row.get("turn_index") is not None else -1
    return ("" if column is None else id_column(row, column)), turn


def _unpacked(value: object) -> object:
    """JSON that a data base gave as text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _filled(text: str, column: str) -> str:
    if not text:
        raise BadRow("empty prompt", column=column)
    return text


UNITS_S = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
_LARGEST = 1e20
_FIRST_YEAR_S, _LAST_YEAR_S = 1e8, 1e11  # dates since 1970 lie between, in seconds; no two units overlap


class Times:
    """Seconds of a log's times: dates as text, or numbers of one unit.

    Without a unit, given or of the layout, a number must be a date since 1970, whose size tells it;
    else a `UserError` asks. A `UserError` also refuses a unit that was given for dates as text.
    """

    def __init__(self, given: str | None, of_layout: str | None, source: str) -> None:
        self.unit, self._given, self._source = given or of_layout, given, source

    def seconds(self, row: Row, column: str) -> float:
        value = row.get(column)
        if value is None or value == "":
            raise BadRow("missing column", column=column)
        if isinstance(value, str):
            if self._given is not None:
                raise UserError(f"{self._source}: {column!r} holds dates, not numbers; leave out --time-unit")
            try:
                date = datetime.datetime.fromisoformat(value)
            except ValueError as error:
                raise BadRow("not a time", "give a number or an ISO date", column) from error
            return (date if date.tzinfo else date.replace(tzinfo=datetime.UTC)).timestamp()
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRow("not a time", f"it is of type {type(value).__name__}", column)
        if not abs(value) < _LARGEST:
            raise BadRow("number too large", f"it is over {_LARGEST:g}", column)
        if self.unit is None:
            fitting = [u for u, s in UNITS_S.items() if _FIRST_YEAR_S <= value * s < _LAST_YEAR_S]
            if not fitting:
                raise UserError(
                    f"{self._source}: the times in {column!r} are no dates, so their unit is unclear; "
                    f"give it with --time-unit {', '.join(UNITS_S)}"
                )
            self.unit = fitting[0]
        return value * UNITS_S[self.unit]
