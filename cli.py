"""What every command line here shares: a user's mistake, or a full disk, ends in one line and exit code 2."""

import argparse
import errno
import os
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake of the user's. The message names the flag or file and says what to change."""


def run(main: Callable[[], None]) -> None:
    """Calls main; turns UserError and a full disk into one line on stderr and exit code 2, Ctrl-C into exit code 130."""
    who = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    try:
        main()
    except UserError as error:
        sys.exit(_end(f"{who}error: {error}", 2))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        where = f" ({error.filename})" if error.filename else ""
        sys.exit(_end(f"{who}error: {error.strerror}{where}: free some space and run the same command again", 2))
    except KeyboardInterrupt:
        sys.exit(_end(f"\n{who}interrupted: run the same command again to go on", 130))


def _end(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds each flag's default to its help, unless there is none to tell."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False) or not action.option_strings:
            return action.help
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def count(text: str) -> int:
    """An argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def fraction(text: str) -> float:
    """An argparse type: a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def seed(text: str) -> int:
    """An argparse type: an integer in [0, 2**32)."""
    value = int(text)
    if not 0 <= value < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 2**32 - 1")
    return value
