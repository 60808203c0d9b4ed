"""Settings as frozen dataclasses, whose fields define the command-line flags.

Declare fields with `setting`, add their flags with `add_flags`, and build the object with
`read_flags`.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args

Config = TypeVar("Config")


def setting(default: Any = dataclasses.MISSING, *, help: str, **options: Any) -> Any:
    """Declare a field of a settings dataclass.

    Args:
        default: Default value. A field without one becomes a required flag.
        help: Help text: a noun phrase that describes the value, with its unit.
        options: `flags` (the names on the command line; default: `--field-name`), `may_change`
            (whether a resumed run may use another value), and any keyword of `add_argument`.
    """
    return dataclasses.field(default=default, metadata={"help": help, **options})


def get_flag_names(field: dataclasses.Field) -> tuple[str, ...]:
    """Return a field's names on the command line, the main one first."""
    return field.metadata.get("flags", (f"--{field.name.replace('_', '-')}",))


def get_destination(field: dataclasses.Field) -> str:
    """Return the attribute under which argparse stores the field's value."""
    return get_flag_names(field)[0].removeprefix("--").replace("-", "_")


def get_flag_of_field(config: type, name: str) -> str:
    """Return the flag of the field `name`, for messages."""
    return next(
        get_flag_names(field)[0] for field in dataclasses.fields(config) if field.name == name
    )


def get_argparse_type(field: dataclasses.Field) -> Any:
    """Return the type of a field without `None`, such as `int` for `int | None`."""
    kinds = [kind for kind in get_args(field.type) if kind is not NoneType]
    return kinds[0] if len(kinds) == 1 else field.type


def add_flags(group: Any, config: type, **overrides: Any) -> None:
    """Add one flag per field with a help text to a parser or an argument group.

    Args:
        group: The parser or the group.
        config: A settings dataclass.
        overrides: Keyword arguments of `add_argument` that replace the options of every field.
    """
    for field in dataclasses.fields(config):
        if "help" not in field.metadata:
            continue
        options = {k: v for k, v in field.metadata.items() if k not in ("flags", "may_change")}
        if field.default is dataclasses.MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        kind = get_argparse_type(field)
        if kind is bool:
            options.setdefault("action", "store_true")
        elif kind in (int, float, Path):
            options.setdefault("type", kind)
        group.add_argument(*get_flag_names(field), **options | overrides)


def read_flags(config: type[Config], args: argparse.Namespace) -> Config:
    """Build a settings dataclass from parsed flags. Lists become tuples."""
    fields = dataclasses.fields(config)  # type: ignore[arg-type]  # every Config is a dataclass
    values = {field.name: getattr(args, get_destination(field)) for field in fields}
    return config(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def record_flags(*configs: Any) -> dict[str, Any]:
    """Return settings as a flat, JSON-serializable dict, with argparse's names as keys."""
    return {
        get_destination(field): to_plain(getattr(config, field.name))
        for config in configs
        for field in dataclasses.fields(config)
    }


def to_plain(value: Any) -> Any:
    """Return a value as JSON stores it: lists instead of tuples and strings instead of paths."""
    return json.loads(json.dumps(value, default=str))
