"""The middle of an over-long text cut out: the first half and the last half of its tokens stay.

Tokenises only what can be kept, so that a text of 16 million characters costs no more than
one of the limit's length. Knows no prompt.

    ids, cut = middle_cut(text, tokenizer.encode, num_tokens=4096)
"""

from __future__ import annotations

import re
from collections.abc import Callable

# DeepSeek's vocabulary never joins a line's end to a following character that is no space,
# so text tokenised in parts between such borders has the tokens of the whole.
_BORDER = re.compile(r"\n(?=\S)")
_PART_CHARS = 1 << 14


def middle_cut(text: str, encode: Callable[[str], list[int]], num_tokens: int) -> tuple[list[int], bool]:
    """At most `num_tokens` ids of `text`, and whether any were cut out; the first half takes the odd one."""
    head = _first_tokens(text, encode, num_tokens + 1)
    if len(head) <= num_tokens:
        return head, False
    num_tail = num_tokens // 2
    tail = _last_tokens(text, encode, num_tail)
    return head[: num_tokens - num_tail] + tail[len(tail) - num_tail :], True


def _first_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """The ids of a beginning of `text` that has at least `enough` of them, or of all of it."""
    ids: list[int] = []
    at = 0
    while at < len(text) and len(ids) < enough:
        border = _BORDER.search(text, at + _PART_CHARS)
        end = border.end() if border else len(text)
        ids += encode(text[at:end])
        at = end
    return ids


def _last_tokens(text: str, encode: Callable[[str], list[int]], enough: int) -> list[int]:
    """The same of an end of `text`."""
    parts: list[list[int]] = []
    end = len(text)
    while end > 0 and sum(map(len, parts)) < enough:
        at = _border_before(text, end - _PART_CHARS)
        parts.append(encode(text[at:end]))
        end = at
    return [token for part in reversed(parts) for token in part]


def _border_before(text: str, limit: int) -> int:
    """The last border at or before `limit`, else the text's beginning."""
    while limit > 0:
        at = text.rfind("\n", 0, limit) + 1
        if at == 0 or _BORDER.match(text, at - 1):
            return at
        limit = at - 1
    return 0
