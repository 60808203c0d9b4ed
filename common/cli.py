"""Parse command lines, and report user errors as one line."""

import argparse
import difflib
import errno
import importlib.util
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import torch

from common.logs import get_logger, get_rank_prefix, is_first_process, showing_messages

logger = get_logger(__name__)

Number = TypeVar("Number", int, float)

MAX_REASON_LENGTH = 200  # characters of the message of a library in an error message
EXIT_STOPPED = 75  # exit code of a run stopped by a signal; rerun to resume (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # exit code after Ctrl-C

FULL_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
)


class UserError(ValueError):
    """An error that the user can fix. The message names the flag or file and the remedy."""


def first_line(error: Exception) -> str:
    """Return the type of an error and the first line of its message, for unexpected errors."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def describe_read_error(error: Exception) -> str:
    """Describe why a file cannot be read, in one line of at most MAX_REASON_LENGTH characters.

    Names of Python classes are omitted, unless the error has no message.
    """
    message = " ".join(str(error).split())
    if isinstance(error, KeyError):
        message = f"{message} is missing"
    return message[:MAX_REASON_LENGTH] or type(error).__name__


def require_package(name: str, purpose: str) -> None:
    """Check that an optional package is installed.

    Args:
        name: Name of the package, as in an import statement.
        purpose: Command or flag that needs the package.

    Raises:
        UserError: The package is not installed.
    """
    if importlib.util.find_spec(name) is None:
        package = name.replace("_", "-")
        raise UserError(f"{purpose} requires {package}; install it with pip install {package}")


def print_warning(message: str) -> None:
    """Log a warning that is the same on all processes, unless the message is empty.

    Only the first process shows it.
    """
    if message:
        level = logging.WARNING if is_first_process() else logging.INFO
        logger.log(level, "warning: %s", message)


class DiskFullSafeStream:
    """Wraps stdout or stderr so that a message that cannot be written does not end the program.

    Failed writes are ignored, for example if the output is redirected to a file on a full disk.
    Characters that the encoding of the stream cannot represent are written as escape sequences.

    Args:
        stream: The stream, or None if it is closed, as after `command >&-`.
    """

    def __init__(self, stream: TextIO | None):
        # The null device also occupies the file descriptor, on which libraries print messages.
        self.stream = stream or Path(os.devnull).open("w")  # noqa: SIM115 (stays open)

    def write(self, text: str) -> int:
        """Write the text, and return its length even if the write fails."""
        with suppress(OSError):
            try:
                self.stream.write(text)
            except UnicodeEncodeError:  # raised before anything is written
                self.stream.write(text.encode("ascii", "backslashreplace").decode())
        return len(text)

    def flush(self) -> None:
        """Flush the stream, and ignore errors."""
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run(main: Callable[[], None]) -> None:
    """Call `main`, show its messages, and report user errors as one line on stderr.

    Raises:
        SystemExit: With code 2 after a UserError, or after an OSError caused by a full disk or by
            a path that cannot be written; with code 130 after Ctrl-C.
    """
    prefix = get_rank_prefix()
    sys.stdout = DiskFullSafeStream(sys.stdout)
    sys.stderr = DiskFullSafeStream(sys.stderr)
    try:
        with showing_messages():
            main()
    except UserError as error:
        _exit(f"{prefix}error: {error}", 2)
    except OSError as error:
        if error.errno in FULL_DISK_ERRORS:
            remedy = "free some space and rerun the same command"
        elif error.errno in PATH_ERRORS:
            remedy = "choose another path"
        else:
            raise
        path = f" ({error.filename})" if error.filename else ""
        _exit(f"{prefix}error: {error.strerror}{path}; {remedy}", 2)
    except KeyboardInterrupt:
        _exit(f"\n{prefix}interrupted; rerun the same command to resume", EXIT_INTERRUPTED)


def _exit(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr, flush=True)
    sys.exit(code)


class Parser(argparse.ArgumentParser):
    """An argument parser whose help shows all defaults and whose errors are UserErrors.

    Args:
        doc: Docstring of the command; its first line becomes the description.
        prog: The command as the user types it.
        required_usage: Required arguments, for the usage line.
        trailing_usage: Arguments that follow all flags, for the usage line.
    """

    def __init__(self, doc: str | None, prog: str, required_usage: str, trailing_usage: str = ""):
        super().__init__(
            prog=prog,
            usage=f"{prog} {required_usage} [flags] {trailing_usage}".rstrip(),
            description=(doc or "").split("\n")[0],
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    # argparse declares overloads for namespaces of other types, which are not needed here.
    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None
    ) -> argparse.Namespace:
        """Parse the arguments. The error for an unknown flag suggests a similar one."""
        parsed, unknown = self.parse_known_args(args)
        if unknown:
            message = f"unrecognized arguments: {' '.join(unknown)}"
            similar = difflib.get_close_matches(unknown[0].split("=")[0], self._list_flags(), 1)
            if similar:
                message += f"; did you mean {similar[0]}?"
            self.error(message)
        return parsed

    def error(self, message: str) -> NoReturn:
        """Raise a UserError with argparse's message."""
        raise UserError(f"{message} (--help lists every flag)")

    def _list_flags(self) -> list[str]:
        """Return all flags, parsed from the help because argparse has no public list of them."""
        headings = re.findall(r"^  (-.*?)(?:  |$)", self.format_help(), re.MULTILINE)
        return re.findall(r"--[\w-]+", " ".join(headings))


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adapts the help to the width of the terminal, and shows short metavars and all defaults.

    Overriding these private methods is safe, because argparse's built-in formatters do the same.
    """

    def __init__(self, prog: str):
        width = min(120, shutil.get_terminal_size((120, 24)).columns)
        super().__init__(prog, max_help_position=40, width=width)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, ()) or not action.option_strings:
            return action.help
        if isinstance(action.default, (list, tuple)):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return METAVARS.get(action.type, "NAME")


def _make_number_type(
    convert: Callable[[str], Number], is_valid: Callable[[Number], bool], description: str
) -> Callable[[str], Number]:
    """Return an argparse type for the numbers that `is_valid` accepts."""

    def parse(text: str) -> Number:
        with suppress(ValueError):
            value = convert(text)
            if is_valid(value):  # False for NaN
                return value
        raise argparse.ArgumentTypeError(f"{text} is not {description}")

    return parse


positive_int = _make_number_type(int, lambda value: value >= 1, "a positive integer")
non_negative_int = _make_number_type(int, lambda value: value >= 0, "a non-negative integer")
seed = _make_number_type(int, lambda value: 0 <= value < 2**32, "an integer from 0 to 2**32 - 1")
fraction = _make_number_type(float, lambda value: 0 <= value <= 1, "a number in [0, 1]")
decay = _make_number_type(float, lambda value: 0 <= value < 1, "a number in [0, 1)")
# Infinity is not a valid value of any flag.
non_negative_float = _make_number_type(
    float, lambda value: 0 <= value < math.inf, "a non-negative number"
)
positive_float = _make_number_type(float, lambda value: 0 < value < math.inf, "a positive number")


def device(text: str) -> str:
    """Parse the name of a device (an argparse type). A GPU must exist on this machine."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; choose cpu, cuda or cuda:N")
    if text != "cpu" and int(text.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this machine has no {text}")
    return text


def is_url(text: str) -> bool:
    """Return whether a text is a URL, such as "s3://bucket/folder", instead of a path."""
    return re.match(r"[a-z][a-z0-9+.-]*://", text) is not None


def path_or_url(text: str) -> Path | str:
    """Parse a path or a URL (an argparse type). A URL remains a string."""
    return text if is_url(text) else Path(text)


def add_device_flag(add: Callable[..., Any], help: str) -> None:
    """Add --device, whose default is a GPU if there is one.

    Args:
        add: The method `add_argument` of a parser or of an argument group.
        help: Help text.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=device, default=default, help=help)


METAVARS: dict[Any, str] = {
    **dict.fromkeys((positive_int, non_negative_int, seed, int), "N"),
    **dict.fromkeys((fraction, decay, non_negative_float, positive_float, float), "X"),
    Path: "PATH",
    path_or_url: "PATH",
    device: "DEVICE",
}


def format_flags(record: dict[str, Any]) -> str:
    """Return recorded flags as they are written on the command line, one flag per line.

    Flags that are unset (None, or False for a switch) are left out.
    """
    lines = []
    for key, value in record.items():
        if value is not None and value is not False:
            value_text = "" if value is True else format_value(value)
            lines.append(f"--{key.replace('_', '-')} {value_text}".rstrip())
    return "\n".join(lines)


def format_value(value: Any) -> str:
    """Return a value as it is written on the command line."""
    return " ".join(map(format_value, value)) if isinstance(value, (list, tuple)) else str(value)
