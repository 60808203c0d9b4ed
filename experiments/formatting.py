"""Format numbers and Markdown tables for the pages of the studies."""

import math
from collections.abc import Sequence

from experiments.speedup import Bounds


def format_markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table. The first row contains the headers."""
    header, *body = (f"| {' | '.join(row)} |" for row in rows)
    return [header, "|" + "---|" * len(rows[0]), *body]


def abbreviate(count: float) -> str:
    """Format a number with a suffix, such as 384000 as "384K"."""
    if count >= 1e6:
        return f"{count / 1e6:.3g}M"
    if count >= 1e3:
        return f"{count / 1e3:.3g}K"
    return f"{count:g}"


def format_bounds(bounds: Bounds, divisor: float = 1.0) -> str:
    """Format a quotient as "1.12" if it is known, otherwise as "> 1.12", "< 1.12" or "unknown"."""
    low = bounds.low / divisor
    high = bounds.high / divisor
    if low == high:
        return f"{low:.2f}"
    parts = []
    if low > 0:
        parts.append(f"> {low:.2f}")
    if high < math.inf:
        parts.append(f"< {high:.2f}")
    return " and ".join(parts) or "unknown"
