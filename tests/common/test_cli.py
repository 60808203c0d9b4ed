"""Command-line errors are one line with an exit code, and suggest a flag for an unknown one."""

import importlib
import sys

import pytest

from common import cli
from common.cli import Parser, UserError


def make_parser() -> Parser:
    parser = Parser("Do something.", "tool", "--size N")
    parser.add_argument("--size", type=cli.positive_int, required=True, help="size in pixels")
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-steps", "--steps", type=cli.positive_int, default=4, help="see --far")
    return parser


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--num-step", "3", "more"],
            "unrecognized arguments: --num-step 3 more; did you mean --num-steps?",
        ),
        (
            ["--num-step=a-value-that-is-longer-than-the-flag"],
            "--num-step=a-value-that-is-longer-than-the-flag; did you mean --num-steps?",
        ),
        (["--stepz=3"], "did you mean --steps?"),
        (["--xyzzy"], r"unrecognized arguments: --xyzzy \(--help"),
        (["--far"], r"unrecognized arguments: --far \(--help"),
        (["--size", "0"], "argument --size: 0 is not a positive integer"),
    ],
)
def test_parser_errors_name_the_argument(flags, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        make_parser().parse_args(["--size", "8", *flags])


def test_help_shows_defaults():
    text = make_parser().format_help()
    assert "usage: tool --size N [flags]" in text and "(default: 4)" in text


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UserError("--size 3 is odd"), 2, "error: --size 3 is odd\n"),
        (OSError(28, "No space left on device", "a"), 2, "No space left on device (a); free some"),
        (PermissionError(13, "Permission denied", "a"), 2, "Permission denied (a); choose"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the same command to resume"),
    ],
)
def test_run_reports_errors_in_one_line(error, code, message, capsys, monkeypatch):
    def main():
        raise error

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(SystemExit) as stop:
        cli.run(main)
    printed = capsys.readouterr().err
    assert stop.value.code == code and message in printed and printed.strip().count("\n") == 0


def test_run_does_not_hide_other_errors(monkeypatch):
    def main():
        raise FileNotFoundError(2, "No such file or directory", "a")

    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    with pytest.raises(FileNotFoundError):
        cli.run(main)


def test_missing_optional_package_gives_an_error_with_the_pip_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    package = "torch-fidelity"
    message = f"^the Inception network requires {package}; install it with pip install {package}$"
    with pytest.raises(UserError, match=message):
        cli.require_package("torch_fidelity", "the Inception network")
    cli.require_package("torch", "everything")


@pytest.mark.parametrize(
    ("module", "package"),
    [("evaluations.curves", "matplotlib"), ("evaluations.report", "jinja2")],
)
def test_command_without_its_optional_package_ends_in_one_line(call, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, package, None)
    code, out = call(importlib.import_module(module), "exps/missing")
    message = f"error: {module} requires {package}; install it with pip install {package}\n"
    assert (code, out) == (2, message)
