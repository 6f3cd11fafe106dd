"""Command-line flags made from the fields of a settings dataclass, and one table of their help texts.

Type, default and choices are the field's own. Standard library only.

    FLAGS = {"block_size": Flag("tokens in a block"), "level": Flag("what a record holds")}
    add_flags(parser.add_argument, TraceConfig, FLAGS)          # --block-size N, --level {full,...}
    config = TraceConfig(**values_of(parser.parse_args(), FLAGS))
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """What a field does not say of its flag. The first of `names` is the flag's own, the others also work."""

    help: str
    names: tuple[str, ...] = ()  # none: --field-name
    choices: Sequence[str] | None = None  # of a plain `str` field; a Literal has its own
    metavar: str | None = None
    negated: bool = False  # the flag turns a true field off

    def option_strings(self, field: str) -> tuple[str, ...]:
        return self.names or (f"--{field.replace('_', '-')}",)

    def dest(self, field: str) -> str:
        """The attribute that argparse gives the value."""
        return self.option_strings(field)[0].removeprefix("--").replace("-", "_")


Flags = Mapping[str, Flag]
"""Field of the settings to its flag, in the order of the help."""


def add_flags(
    add: Callable[..., argparse.Action], settings: type, flags: Flags, required: Sequence[str] = ()
) -> None:
    """Adds each flag with `add`, a parser's or a group's `add_argument`. A bool's flag takes no value."""
    hints = typing.get_type_hints(settings)
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    for field, flag in flags.items():
        options: dict[str, Any] = {"help": flag.help}
        kind = _without_none(hints[field])
        if kind is bool:
            options["action"] = "store_true"
        else:
            default = defaults[field]
            options["default"] = None if default is dataclasses.MISSING else default
            options["choices"] = flag.choices or typing.get_args(kind) or None
            options["type"] = None if options["choices"] or kind is str else kind
            options["metavar"] = flag.metavar
            options["required"] = field in required
        add(*flag.option_strings(field), **options)


def values_of(args: argparse.Namespace, flags: Flags) -> dict[str, Any]:
    """The fields' values as the flags give them."""
    given = {field: getattr(args, flag.dest(field)) for field, flag in flags.items()}
    return {field: not value if flags[field].negated else value for field, value in given.items()}


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`; the choices of a Literal are left as they are."""
    if typing.get_origin(hint) is typing.Literal:
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint
