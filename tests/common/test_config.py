"""Settings dataclasses: flags are generated from the fields, and values are read and recorded."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from common.cli import Parser, UserError
from common.config import add_flags, get_flag_of_field, read_flags, record_flags, setting


@dataclass(frozen=True)
class Config:
    exp_name: str = setting(help="name")
    steps: int = setting(3, help="steps", flags=("--num-steps", "--steps"), may_change=True)
    folders: tuple[Path, ...] = setting((Path("a"),), help="folders", type=Path, nargs="+")
    fast: bool = setting(False, help="less accurate")
    limit: float | None = setting(None, help="limit")


def make_parser(**overrides) -> Parser:
    parser = Parser("Do something.", "tool", "--exp-name NAME")
    add_flags(parser, Config, **overrides)
    return parser


def parse(*flags) -> Config:
    return read_flags(Config, make_parser().parse_args(flags))


def test_flags_set_the_fields_of_the_same_name():
    assert parse("--exp-name", "x") == Config("x")
    flags = "--exp-name x --num-steps 5 --folders b c --fast --limit 0.5"
    assert parse(*flags.split()) == Config("x", 5, (Path("b"), Path("c")), True, 0.5)
    assert parse("--exp-name", "x", "--steps", "7").steps == 7
    assert (
        get_flag_of_field(Config, "steps") == "--num-steps"
        and get_flag_of_field(Config, "limit") == "--limit"
    )


def test_field_without_default_is_required():
    with pytest.raises(UserError, match="arguments are required: --exp-name"):
        parse("--fast")


def test_overrides_replace_the_options_of_every_field():
    parser = make_parser(default=None, required=False)
    assert not any(vars(parser.parse_args([])).values())


def test_record_contains_plain_values_by_the_name_of_the_flag():
    config = Config("x", folders=(Path("b"), Path("c")))
    assert record_flags(config) == {
        "exp_name": "x",
        "num_steps": 3,
        "folders": ["b", "c"],
        "fast": False,
        "limit": None,
    }
