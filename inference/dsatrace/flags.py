"""Settings dataclasses whose fields are command-line flags. Standard library only.

A field's annotation holds its `Flag`; type, default and choices are the field's own. `check` refuses
what the flag would.

    @dataclasses.dataclass(frozen=True)
    class Settings:
        block_size: Annotated[int, Flag("tokens in a block", at_least=1)] = 16
        level: Annotated[Level, Flag("what a record holds", ("--trace-level",))] = "full"

    flags = flags_of(Settings)
    add_flags(parser.add_argument, Settings, flags)       # --block-size N, --trace-level {full,...}
    settings = Settings(**values_of(parser.parse_args(), flags))
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dsatrace.errors import UserError


class Flag(NamedTuple):
    """What a field's type and default do not say. The first of `names` counts; the others also work."""

    help: str
    names: tuple[str, ...] = ()  # none: --field-name
    choices: Sequence[str] | None = None  # of a plain `str` field; a Literal has its own
    metavar: str | None = None
    negated: bool = False  # the flag turns a true field off
    at_least: int | None = None

    def option_strings(self, field: str) -> tuple[str, ...]:
        return self.names or (option(field),)

    def dest(self, field: str) -> str:
        """The attribute that argparse gives the value."""
        return self.option_strings(field)[0].removeprefix("--").replace("-", "_")


Flags = Mapping[str, Flag]
"""Field of the settings to its flag, in the order of the help."""


def option(field: str) -> str:
    """`--field-name`."""
    return f"--{field.replace('_', '-')}"


def flags_of(settings: type) -> dict[str, Flag]:
    """The fields that are annotated with a `Flag`; a base class's come first."""
    hints = typing.get_type_hints(settings, include_extras=True)
    annotated = {
        field: hint.__metadata__[0] for field, hint in hints.items() if hasattr(hint, "__metadata__")
    }
    return {field: flag for field, flag in annotated.items() if isinstance(flag, Flag)}


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


def check(settings: Any) -> None:
    """Raises `UserError` for a value that is too small, or none of its choices; for `__post_init__`."""
    hints = typing.get_type_hints(type(settings))
    for field, flag in flags_of(type(settings)).items():
        value, kind = getattr(settings, field), _without_none(hints[field])
        name = flag.option_strings(field)[0]
        if value is None:
            continue
        if flag.at_least is not None and value < flag.at_least:
            raise UserError(f"{name} {value}: use at least {flag.at_least}")
        choices = flag.choices or typing.get_args(kind)
        if choices and value not in choices:
            raise UserError(f"{name} {value}: use one of {', '.join(choices)}")


def _without_none(hint: Any) -> Any:
    """`int` of `int | None`; the choices of a Literal are left as they are."""
    if typing.get_origin(hint) is typing.Literal:
        return hint
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint
