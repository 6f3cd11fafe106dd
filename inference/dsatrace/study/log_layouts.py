"""Layouts of the logs that services write: how each is recognised, and how a row becomes a request.

One table, `LAYOUTS`; its order is that of recognition. A layout's `read` gives the prompt as text, as
messages or as token ids, the answer if there is one, and leaves the time to `log_times`. Opens no file.

    layout = layout_of({"messages": [], "timestamp": 0})      # LAYOUTS["messages"]
    layout.read(row, counts).prompt
"""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from array import array
from collections import Counter
from collections.abc import Callable
from typing import Any

from dsatrace.study.log_messages import Row, answer_of, chat, grouped, items, response_text, whole_answer
from dsatrace.workloads.encoding import Message, Role
from dsatrace.workloads.id_logs import id_array
from dsatrace.workloads.rows import BadRow, text_value
from dsatrace.workloads.trace_rows import count_column, id_column

NOT_FINISHED = "rows about requests that had no answer yet: left out, since another row has both"
_TIMES = ("timestamp", "time", "created", "created_at", "created_time", "start_time", "startTime")
_CONVERSATIONS = ("conversation_id", "session_id", "chat_id", "thread_id")
_UNUSED = ("tools", "functions", "cache_salt", "lora_request")  # what changes or parts real prefixes


@dataclasses.dataclass(frozen=True)
class LoggedRequest:
    """A request as its row tells it; what the row does not tell is empty, and `turn` -1.

    A server that keeps conversations is sent the newest messages only: those before are the prompt and the
    answer of the response `parent_id`, or of the newest one in `thread`; `instructions` come before all.
    """

    prompt: str | tuple[Message, ...] | array[int]
    answer: str | array[int]  # ids beside a prompt of ids
    conversation_id: str = ""
    turn: int = -1
    instructions: str = ""
    response_id: str = ""
    parent_id: str = ""
    thread: str = ""
    workload: str = ""


@dataclasses.dataclass(frozen=True)
class Layout:
    """`told_by`, or else `fits`, recognises a row; one that does not fit is bad.

    `read` gives None for a row that is no request of its own, and counts it. Conversations and block ids have
    readers of their own, and no `read`.
    """

    name: str
    about: str
    fits: Callable[[Row], bool]
    read: Callable[[Row, Counter[str]], LoggedRequest | None] | None
    times: tuple[str, ...] = _TIMES  # the first that a row has is its time
    time_unit: str | None = None  # None: told by the number's size, or by a flag
    told_by: Callable[[Row], bool] | None = None
    unused: tuple[str, ...] = _UNUSED  # columns that are known, and counted where they hold anything
    recorded: bool = True  # whether times are where no column `arrivals` says so: a simulator's are drawn


def layout_of(row: Row) -> Layout | None:
    """The layout of a row, None if none fits."""
    return next((layout for layout in LAYOUTS.values() if (layout.told_by or layout.fits)(row)), None)


def _read_messages(row: Row, counts: Counter[str]) -> LoggedRequest:
    messages, answer = chat(row, "messages", counts)
    return LoggedRequest(messages, whole_answer(answer, response_text(row, counts)), *_conversation(row))


def _read_prompt(row: Row, counts: Counter[str]) -> LoggedRequest:
    if isinstance(row["prompt"], list):
        messages, answer = chat(row, "prompt", counts)
        return LoggedRequest(messages, whole_answer(answer, response_text(row, counts)), *_conversation(row))
    prompt = text_value(row["prompt"], "prompt")
    return LoggedRequest(_filled(prompt, "prompt"), response_text(row, counts), *_conversation(row))


def _read_pair(row: Row, counts: Counter[str]) -> LoggedRequest:
    column = "request" if "request" in row else "body"
    inner = row[column]
    if not isinstance(inner, dict):
        raise BadRow("not an object", f"it is of type {type(inner).__name__}", column)
    _count_unused(inner, _UNUSED, counts)
    if "input" in inner:
        return _read_responses({**{key: row[key] for key in row if key != column}, **inner}, counts)
    read = _read_messages if "messages" in inner else _read_prompt
    if "messages" not in inner and "prompt" not in inner:
        raise BadRow("missing column", "neither messages nor prompt nor input", column)
    request = read({key: inner[key] for key in ("messages", "prompt", "system") if key in inner}, counts)
    conversation, turn = _conversation({**inner, **row})
    answer = whole_answer(str(request.answer), response_text(row, counts))
    return dataclasses.replace(request, answer=answer, conversation_id=conversation, turn=turn)


def _read_responses(row: Row, counts: Counter[str]) -> LoggedRequest:
    """Of OpenAI's Responses API: a request, beside the response object or with its columns among its own."""
    response = answer_of(row)
    told = {**response, **row}
    given = row["input"]
    asked: list[tuple[Role, str]]
    if isinstance(given, list):
        asked = items(given, "input", counts)
    else:
        asked = [("user", text_value(given, "input"))]
    if not any(text for _, text in asked):
        raise BadRow("no prompt", "the input holds no text", "input")
    output = response.get("output")
    if isinstance(output, list):
        output = "\n\n".join(text for _, text in items(output, "output", counts))
    thread = told.get("conversation") or ""
    thread = thread.get("id") if isinstance(thread, dict) else thread
    conversation, turn = _conversation(row)
    thread = text_value(thread, "conversation")
    return LoggedRequest(
        grouped(Message(*each) for each in asked),
        text_value(output or response_text(row, counts), "output"),
        conversation or thread,
        turn,
        instructions=text_value(told.get("instructions") or "", "instructions"),
        response_id=text_value(response.get("id") or "", "id"),
        parent_id=text_value(told.get("previous_response_id") or "", "previous_response_id"),
        thread=thread,
    )


def _read_litellm(row: Row, counts: Counter[str]) -> LoggedRequest:
    """Prompts stand in `messages`, or in `proxy_server_request`; both may be JSON as text, or empty."""
    sources = (_unpacked(row.get("messages")), _unpacked(row.get("proxy_server_request")))
    for source in sources:
        messages = source.get("messages") if isinstance(source, dict) else source
        if isinstance(messages, list) and messages:
            response = {"response": _unpacked(row.get("response"))}
            asked, answer = chat({**row, "messages": messages}, "messages", counts)
            answer = whole_answer(answer, response_text(response, counts))
            return LoggedRequest(asked, answer, *_conversation(row))
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


def _tells_responses(row: Row) -> bool:
    """Not every row with an input: embeddings have one, and files for fine-tuning."""
    given = row.get("input")
    is_items = isinstance(given, list) and all(isinstance(item, dict) for item in given) and bool(given)
    told = {"instructions", "previous_response_id"} & row.keys() or isinstance(
        answer_of(row).get("output"), list
    )
    return is_items or (isinstance(given, str | list) and bool(told))


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
        Layout(
            "responses",
            "OpenAI's Responses API: input, and output or response",
            lambda row: isinstance(row.get("input"), str | list),
            _read_responses,
            told_by=_tells_responses,
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
