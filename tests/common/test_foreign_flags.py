"""Flags of other repositories are accepted with a message, or end in an error with the remedy."""

import pytest

from common import cli
from common.cli import Parser, UserError
from common.foreign_flags import ForeignFlags, UnusedFlag

FLAGS = ForeignFlags(
    unused=(
        UnusedFlag("--fused", "it is always fused", is_switch=True),
        UnusedFlag("--num-heads", "100% of the heads are used"),
    ),
    replacements={"--width": "pass --size", "ODE": "pass --mode ode"},
)


def parse(*argv: str):
    parser = Parser("Do something.", "tool", "--size N")
    parser.add_argument("--size", type=cli.positive_int, required=True)
    return FLAGS.parse(parser, argv)


def test_unused_flags_are_reported_and_not_kept(caplog):
    caplog.set_level("INFO")
    assert vars(parse("--size", "3")) == {"size": 3} and not caplog.messages
    assert parse("--size", "3", "--no-fused", "--num-heads", "2").size == 3
    assert caplog.messages == [
        "--fused has no effect: it is always fused",
        "--num-heads has no effect: 100% of the heads are used",
    ]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--width", "3"], "--width: pass --size"),  # although --size is missing
        (["--size", "3", "--width=3"], "--width: pass --size"),
        (["ODE", "--size", "3"], "ODE: pass --mode ode"),
        (["--size", "ODE"], "ODE is not a positive integer"),
    ],
)
def test_replaced_flags_end_in_an_error_with_the_replacement(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def test_help_lists_unused_flags():
    parser = Parser("Do something.", "tool", "")
    FLAGS.parse(parser, [])
    assert "--no-fused" in parser.format_help() and "100% of the heads" in parser.format_help()
