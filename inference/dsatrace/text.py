"""Text from outside as plain text: names in data, file names, a server's words, a model's answer.

Whatever others wrote goes through `plain` before it reaches a terminal, a table, a picture or a file's
name, so that it moves no cursor, turns no line around and begins no formula. Standard library only.

    print(f"error: {plain(message)}", file=sys.stderr)
    table.add_row(Text(plain(name)))            # rich reads no markup in a Text
    axes.set_title(for_picture(name))
    Path(f"hits_{for_file_name(name)}.png")
"""

from __future__ import annotations

import json
import re
import unicodedata

MAX_CHARS = 4000
"""Of one line in a terminal. What is longer is cut, and says so."""
MAX_FILE_NAME_CHARS = 60

_JOINERS = "\u200c\u200d"
"""Part of words and of emoji in some scripts; they move nothing."""


def plain(text: object, max_chars: int | None = MAX_CHARS, keep: str = "") -> str:
    """One line of printable characters, at most `max_chars` of the text's own.

    Any other character (a control, half of a surrogate pair, a mark that turns the direction) becomes its
    escape in JSON, such as `\\u001b`, unless it is in `keep`. A space of any width becomes a blank.
    """
    given = str(text)
    if max_chars is not None and len(given) > max_chars:
        given = f"{given[:max_chars]}… ({len(given):,} characters)"
    if given.isprintable():
        return given
    return "".join(c if c.isprintable() or c in keep or c in _JOINERS else _escape(c) for c in given)


def plain_lines(text: object) -> str:
    """The same for a text of several lines, which is not cut: line breaks and tabs stay."""
    return plain(text, max_chars=None, keep="\n\t")


def counted(number: float, noun: str) -> str:
    """`1 request`, `2,000 requests`, `0.5 requests`."""
    return f"{number:{',' if isinstance(number, int) else 'g'}} {noun}{'' if number == 1 else 's'}"


def for_picture(text: object, max_chars: int = 80) -> str:
    """The same for matplotlib, where a dollar would begin a formula."""
    return plain(text, max_chars).replace("$", r"\$")


def for_file_name(name: str) -> str:
    """Part of a file's name; empty if nothing of `name` can stand in one. Two names may become one."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:MAX_FILE_NAME_CHARS]


def _escape(char: str) -> str:
    return " " if unicodedata.category(char) == "Zs" else json.dumps(char)[1:-1]
