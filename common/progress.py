"""Show the progress of long loops: a bar on a terminal, and lines of text otherwise.

A redrawn bar would add hundreds of megabytes to the log of a long job. If stderr is not a terminal,
a loop therefore writes one line per minute and a last one.
"""

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 60.0

LINE = "{n_fmt} of {total_fmt} {unit}, {rate_fmt}, {remaining} remaining{postfix}"
LAST_LINE = "{n_fmt} of {total_fmt} {unit} in {elapsed}, {rate_fmt}{postfix}"


class ProgressBar(tqdm):
    """A progress bar of tqdm that writes lines of text if stderr is not a terminal.

    A bar with `leave=False` writes a last line only if the loop took longer than `line_seconds`.

    Args:
        iterable: The items of the loop, or None to call `update` instead.
        line_seconds: Seconds between lines; None if the caller writes the lines.
        options: Other arguments of tqdm.

    Attributes:
        writes_lines: Whether the progress is written as lines.
    """

    def __init__(
        self,
        iterable: Iterable | None = None,
        *,
        line_seconds: float | None = LINE_SECONDS,
        **options: Any,
    ):
        self.writes_lines = not sys.stderr.isatty()
        self.line_seconds = line_seconds
        self.next_line_time = time.monotonic() + (line_seconds or 0.0)
        self.has_lines = False
        # With `gui`, tqdm writes no control characters when a bar is created or closed.
        super().__init__(iterable, gui=self.writes_lines, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Redraw the bar, or write a line if one is due. tqdm calls this on every refresh."""
        if not self.writes_lines:
            return super().display(msg, pos)
        now = time.monotonic()
        if self.line_seconds is not None and now >= self.next_line_time:
            self.next_line_time = now + self.line_seconds
            self.has_lines = True
            self.write_line(self._format(LINE))
        return True

    def clear(self, *args: Any, **options: Any) -> None:
        """Clear the bar before other output; lines stay."""
        if not self.writes_lines:
            super().clear(*args, **options)

    def close(self) -> None:
        """Close the bar, or write the last line."""
        writes_lines = self.writes_lines and self.line_seconds is not None and not self.disable
        if writes_lines and (self.leave or self.has_lines):
            # Without a rate, tqdm computes the mean over the whole loop.
            self.write_line(self._format(LAST_LINE, rate=None))
        super().close()

    def write_line(self, text: str) -> None:
        """Write a line to stderr."""
        self.fp.write(f"{text}\n")
        self.fp.flush()

    def _format(self, line_format: str, **values: Any) -> str:
        # Without a number of columns, the line is not truncated.
        values = {**self.format_dict, "bar_format": line_format, "ncols": None, **values}
        text = self.format_meter(**values)
        description = self.desc.removesuffix(": ")  # set_description adds the suffix
        return f"{description}: {text}" if description else text
