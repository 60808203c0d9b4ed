"""Settings as frozen dataclasses: a field holds the default and the help text, argparse is filled from it.

@dataclass(frozen=True)
class LoopConfig:
    batch_size: int = setting(256, help="global batch size", type=cli.positive)

add_flags(parser.add_argument_group("loop"), LoopConfig)
loop = read_flags(LoopConfig, parser.parse_args())
"""

import argparse
import dataclasses
import typing
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

Config = TypeVar("Config")


def setting(default: Any = dataclasses.MISSING, *, help: str, **options: Any) -> Any:  # noqa: A002 (argparse's own word)
    """Declare a field of a settings dataclass.

    Args:
        default: Default value. A field without one becomes a required flag.
        help: Help text: a noun phrase that says what the value is, with its unit.
        options: `flags`, the names on the command line (default: `--field-name`), or any keyword of
            `add_argument`, such as type, choices, nargs, action and metavar.
    """
    return dataclasses.field(default=default, metadata={"help": help, **options})


def flag_names(field: dataclasses.Field) -> tuple[str, ...]:
    """Return a field's names on the command line, the main one first."""
    return field.metadata.get("flags", (f"--{field.name.replace('_', '-')}",))


def destination(field: dataclasses.Field) -> str:
    """Return the attribute under which argparse stores the field's value."""
    return flag_names(field)[0].removeprefix("--").replace("-", "_")


def flag_of(config: type, name: str) -> str:
    """Return the flag of the field `name`, for messages."""
    return next(flag_names(f)[0] for f in dataclasses.fields(config) if f.name == name)


def add_flags(group: Any, config: type, **overrides: Any) -> None:
    """Add one flag per field to a parser or an argument group.

    Args:
        group: The parser or the group.
        config: A settings dataclass.
        overrides: Keywords of `add_argument` that replace those of every field.
    """
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        options = {key: value for key, value in field.metadata.items() if key != "flags"}
        required = (
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        )
        if required:
            options["required"] = True
        else:
            options["default"] = field.default
        kind = _plain_type(hints[field.name])
        if kind is bool:
            options.setdefault("action", "store_true")
        elif kind in (int, float, Path):
            options.setdefault("type", kind)
        group.add_argument(*flag_names(field), **options | overrides)


def read_flags(config: type[Config], args: argparse.Namespace) -> Config:
    """Build a settings dataclass from parsed flags. Lists become tuples."""
    values = {f.name: getattr(args, destination(f)) for f in dataclasses.fields(config)}  # type: ignore[arg-type]  # a dataclass
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def format_settings(*configs: Any) -> str:
    """Return one line per setting, `--flag value`, below a line with the name of its dataclass."""
    lines = []
    for config in configs:
        lines.append(f"[{type(config).__name__.removesuffix('Config')}]")
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            words = map(str, value) if isinstance(value, tuple) else [str(value)]
            lines.append(" ".join([flag_names(field)[0], *words]))
    return "\n".join(lines)


def _plain_type(hint: Any) -> Any:
    """Return `int` for `int | None`, and the hint itself otherwise."""
    arguments = [kind for kind in typing.get_args(hint) if kind is not NoneType]
    return arguments[0] if len(arguments) == 1 else hint
