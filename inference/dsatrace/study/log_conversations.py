"""Which requests of a log belong together: by the response that they name, or by their common prefix.

rows = continued(rows, parents, counts)      # each prompt with all that its server kept of it
requests = joined(requests, parents, counts)
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dsatrace.study.log_layouts import LoggedRequest
from dsatrace.study.log_messages import grouped
from dsatrace.study.requests import UNKNOWN, StudyRequests
from dsatrace.workloads.encoding import Message

FOUND = "conversations found by common prefix, since no row names one"
JOINED = "requests joined to the conversation whose prompt and answer they begin with"
JOIN_TOKENS = 16
CONTINUED = "requests that go on from the response they name: its prompt and answer put before theirs"
ORPHANS = "requests whose previous response is not in the log before them: taken for first ones"


def continued(
    rows: Iterable[tuple[float, LoggedRequest]], parents: dict[int, int], counts: Counter[str]
) -> Iterator[tuple[float, LoggedRequest]]:
    """Rows by time, each with the messages that its server put before those it was sent.

    Those are its instructions, and what was asked and answered up to the response that it names, without the
    instructions of then. Puts the number of that request into `parents`.
    """
    known: dict[str, tuple[int, tuple[Message, ...]]] = {}
    for number, (time_s, request) in enumerate(rows):
        if not isinstance(request.prompt, tuple):
            yield time_s, request
            continue
        before = known.get(request.parent_id or request.thread)
        messages = request.prompt
        if before is not None:
            parents[number], history = before
            messages = history + messages
            counts[CONTINUED] += 1
        elif request.parent_id:
            counts[ORPHANS] += 1
        so_far = (*messages, Message("assistant", str(request.answer)))
        known |= {name: (number, so_far) for name in (request.response_id, request.thread) if name}
        if request.instructions:
            messages = (Message("system", request.instructions), *messages)
        yield time_s, dataclasses.replace(request, prompt=grouped(messages))


def joined(requests: StudyRequests, parents: Mapping[int, int], counts: Counter[str]) -> StudyRequests:
    """The same requests with conversations: a request goes on with the one whose whole it begins with.

    A whole is prompt and answer; the longest counts, and of equal ones the latest. What `parents` knows comes
    before what prompts begin with. The turn is one more.
    """
    item = requests.prompt_ids.itemsize
    width = JOIN_TOKENS * item
    nodes: dict[tuple[int, bytes], int] = {}  # a chain of whole pieces of a text: its number
    ends: dict[int, dict[bytes, int]] = {}  # by the chain of what a request holds, then the rest: the request
    lengths: dict[int, set[int]] = {}  # of those rests, bytes
    conversation = np.full(len(requests), UNKNOWN, np.int32)
    turn = np.zeros(len(requests), np.int32)
    names: list[str] = []
    for i in range(len(requests)):
        prompt = requests.prompt(i).tobytes()
        whole = prompt + requests.response(i).tobytes()
        node, at, before = UNKNOWN, 0, UNKNOWN
        while True:
            for length in sorted(lengths.get(node, ())):
                if at + length < len(prompt):
                    before = ends[node].get(prompt[at : at + length], before)
            if at + width > len(whole):
                break
            node = nodes.setdefault((node, whole[at : at + width]), len(nodes))
            at += width
        ends.setdefault(node, {})[whole[at:]] = i
        lengths.setdefault(node, set()).add(len(whole) - at)
        found = before != UNKNOWN
        before = parents.get(i, before)
        if before == UNKNOWN:
            conversation[i] = len(names)
            names.append(str(i))
        else:
            conversation[i], turn[i] = conversation[before], turn[before] + 1
            counts[JOINED] += found and i not in parents
    counts[FOUND] = len(names)
    return dataclasses.replace(requests, conversation=conversation, turn=turn, conversation_ids=tuple(names))
