"""What every command line here shares: a user's mistake, or a full disk, ends in one line and exit code 2."""

import argparse
import difflib
import errno
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

import torch


class UserError(ValueError):
    """A mistake of the user's. The message names the flag or file and says what to change."""


class DiskFullSafeStream:
    """stdout or stderr, which may be a file on a full disk: what cannot be shown ends nothing."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(main: Callable[[], None]) -> None:
    """Calls main; turns UserError, a full disk and a place that cannot be written into one line on stderr and exit code 2,
    Ctrl-C into exit code 130.
    """
    who = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    sys.stdout, sys.stderr = DiskFullSafeStream(sys.stdout), DiskFullSafeStream(sys.stderr)
    try:
        main()
    except UserError as error:
        sys.exit(_end(f"{who}error: {error}", 2))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            sys.exit(
                _end(
                    f"{who}error: {error.strerror}{where}: free some space and run the same command again",
                    2,
                )
            )
        if error.errno in (
            errno.EACCES,
            errno.EPERM,
            errno.EROFS,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.ENAMETOOLONG,
        ):
            sys.exit(_end(f"{who}error: {error.strerror}{where}: name another place", 2))
        raise
    except KeyboardInterrupt:
        sys.exit(_end(f"\n{who}interrupted: run the same command again to go on", 130))


def _end(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code


class Parser(argparse.ArgumentParser):
    """Help with every default in it; a flag that argparse refuses ends in one line too, without the whole usage.

    `required` is what the usage line shows: the flags that nobody can leave out; `last` what stands behind all flags.
    """

    def __init__(self, doc: str, prog: str, required: str, last: str = ""):
        super().__init__(
            prog=prog,
            usage=f"{prog} {required} [flags] {last}".rstrip(),
            description=doc.split("\n")[0],
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = message.split()[2].split("=")[0]
            near = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            message = f"unrecognized arguments: {message.split(': ', 1)[1]}{f'; did you mean {near[0]}?' if near else ''}"
        raise UserError(f"{message} (--help lists every flag)")


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Wide; adds a flag's default to its help, unless there is none to tell; short words for values."""

    def __init__(self, prog: str):
        super().__init__(
            prog, max_help_position=40, width=min(120, shutil.get_terminal_size((120, 24)).columns)
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or not action.option_strings:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (positive_int, non_negative_int, seed):
            return "N"
        if action.type in (fraction, decay, non_negative_float, positive_float, float):
            return "X"
        return {Path: "PATH", device: "DEVICE"}.get(action.type, "NAME")


def _number(text: str, kind: type, allowed: Callable[[float], bool], which: str) -> float:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if math.isnan(value) or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text} is not {which}")
    return value


def positive_int(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    return _number(text, int, lambda value: value >= 1, "a whole number of at least 1")


def non_negative_int(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    return _number(text, int, lambda value: value >= 0, "a whole number of at least 0")


def seed(text: str) -> int:
    """An argparse type: an integer in [0, 2**32)."""
    return _number(
        text, int, lambda value: 0 <= value < 2**32, "a whole number from 0 to 2**32 - 1"
    )


def fraction(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    return _number(text, float, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def decay(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    return _number(text, float, lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    return _number(text, float, lambda value: 0 <= value < math.inf, "a number of at least 0")


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    return _number(text, float, lambda value: 0 < value < math.inf, "a number above 0")


def device(text: str) -> str:
    """An argparse type: cpu, cuda or cuda:N, as far as this machine has it."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda, cuda:N")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text} here")
    return text
