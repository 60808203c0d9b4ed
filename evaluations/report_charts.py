"""Line charts over images seen, as inline SVG."""

import math
from typing import NamedTuple

import numpy as np

from evaluations.report_page import Html, el

WIDTH, HEIGHT, TOP, RIGHT, BOTTOM = 420, 240, 10, 20, 40
LETTER = 7.4  # pixels of a digit
MOST = 240  # points of a line
SMOOTH_FROM = 100  # lines with fewer points stay as they are
DASHES = (None, "7 4", "2 4", "9 4 2 4", "14 5")
LOG_FROM = 4  # times that the largest value is the smallest, before an axis turns logarithmic


class Series(NamedTuple):
    """One line: x and y (n,), NaN where nothing was measured."""

    x: np.ndarray
    y: np.ndarray
    colour: int
    label: str
    dash: int = 0
    dots: bool = False  # few and measured apart: each is marked, and says its value


def finite(series: Series) -> np.ndarray:
    """Which of its points can be drawn: (n,) bool."""
    return np.isfinite(series.x) & np.isfinite(series.y)


def smoothed(x: np.ndarray, y: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """Running median at `most` points, over 2% of the line: less at its beginning, where curves are steep, and at its end only
    over what came before. NaN counts nowhere; a point without a value stays without.
    """
    middle = np.unique(np.linspace(0, len(y) - 1, min(most, len(y))).round().astype(int))
    y = np.where(np.isfinite(y), y, np.nan)
    half = np.minimum(len(y) // 100, middle)
    values = [
        np.nan if np.isnan(y[i]) else np.nanmedian(y[i - h : i + h + 1])
        for i, h in zip(middle, half)
    ]
    return x[middle], np.array(values)


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """Of each of most / 2 stretches the lowest and the highest point, so that no spike is lost; a stretch without any stays a
    gap.
    """
    if len(x) <= most:
        return x, y
    kept: list[int] = []
    for part in np.array_split(np.arange(len(x)), most // 2):
        known = part[np.isfinite(y[part])]
        kept += (
            sorted({known[y[known].argmin()], known[y[known].argmax()]})
            if len(known)
            else [part[0]]
        )
    return x[kept], y[kept]


def linear_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high]."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    return [
        k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 in every decade, or decades alone where those are many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    stride = max(1, len(decades) // 5)
    for factors in ((1, 2, 5), (1,)):
        found = [
            f * 10.0**d
            for d in (decades if len(factors) > 1 else decades[::stride])
            for f in factors
        ]
        found = [tick for tick in found if low <= tick <= high]
        if len(found) <= 7:
            break
    return found if len(found) >= 2 else linear_ticks(low, high)


def short(value: float, size: float | None = None) -> str:
    """A tick: 25k, 1.5M; in the unit that `size`, the largest tick of the axis, is told in."""
    size = abs(value) if size is None else size
    unit, letter = next(
        ((u, name) for u, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if size >= max(u, 1e4)),
        (1, ""),
    )
    return f"{float(f'{value / unit:.6g}'):g}{letter if value else ''}"


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """Moves over NaN, lines otherwise; a point alone becomes a dot by its round ends."""
    parts, lifted = [], True
    for a, b in zip(x, y):
        if not np.isfinite(a + b):
            lifted = True
            continue
        parts.append(f"M{a:.1f} {b:.1f}h0" if lifted else f"L{a:.1f} {b:.1f}")
        lifted = False
    return "".join(parts)


def chart(title: str, lines: list[Series], log: bool = True, zero: bool = False) -> Html:
    """The lines that have a point, over images seen. log: where all is positive and far apart, the axis is logarithmic; zero:
    it begins at zero.
    """
    lines = [line for line in lines if finite(line).any()]
    values = np.concatenate([line.y[finite(line)] for line in lines])
    low, high = float(values.min()), float(values.max())
    log = log and low > 0 and high / low > LOG_FROM
    if high - low < 1e-9 * max(abs(low), abs(high)):  # equal but for rounding
        low = high
    if log:
        low, high = low / (high / low) ** 0.04, high * (high / low) ** 0.04
    else:
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1
        low, high = 0 if zero and low >= 0 else low - pad, high + pad
    ticks = log_ticks(low, high) if log else linear_ticks(low, high)
    last = max(float(line.x[finite(line)].max()) for line in lines) or 1
    told = [short(tick, None if log else max(map(abs, ticks))) for tick in ticks]
    left = 12 + LETTER * max(map(len, told))
    bottom = HEIGHT - BOTTOM

    def across(x: np.ndarray | float) -> np.ndarray | float:
        return left + np.asarray(x, float) / last * (WIDTH - RIGHT - left)

    def up(y: np.ndarray | float) -> np.ndarray | float:
        y = np.asarray(y, float)
        share = np.log(y / low) / math.log(high / low) if log else (y - low) / (high - low)
        return bottom - share * (bottom - TOP)

    drawn = []
    for tick, words in zip(ticks, told):
        drawn.append(el("path", d=f"M{left:.1f} {up(tick):.1f}H{WIDTH - RIGHT}", class_="grid"))
        drawn.append(
            el("text", words, x=f"{left - 7:.1f}", y=f"{up(tick) + 4.5:.1f}", text_anchor="end")
        )
    for tick in (times := linear_ticks(0, last)):
        drawn.append(el("path", d=f"M{across(tick):.1f} {bottom}v4", class_="grid"))
        drawn.append(
            el(
                "text",
                short(tick, times[-1]),
                x=f"{across(tick):.1f}",
                y=bottom + 18,
                text_anchor="middle",
            )
        )
    drawn.append(
        el(
            "text",
            "images seen",
            x=f"{(left + WIDTH - RIGHT) / 2:.1f}",
            y=HEIGHT - 5,
            text_anchor="middle",
        )
    )
    for line in lines:
        drawn += _drawn(line, across, up)
    said = "; ".join(f"{line.label} ends at {line.y[finite(line)][-1]:.4g}" for line in lines)
    return el(
        "svg",
        *drawn,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        class_="chart",
        aria_label=f"{title} over images seen: {said}",
    )


def _drawn(line: Series, across, up) -> list[Html]:
    """A line's path, the one as logged faintly under the smoothed one; for `dots` a mark for each point."""
    colour, dash = f"c{line.colour}", DASHES[line.dash % len(DASHES)]
    x, y = line.x, np.where(finite(line), line.y, np.nan)
    if line.dots:
        x, y = x[finite(line)], y[finite(line)]
    parts = []
    a, b = thinned(x, y)
    if len(x) >= SMOOTH_FROM and not line.dots:
        parts.append(el("path", d=_path(across(a), up(b)), class_=f"line raw {colour}"))
        a, b = smoothed(x, y)
    parts.append(
        el("path", d=_path(across(a), up(b)), class_=f"line {colour}", stroke_dasharray=dash)
    )
    for at, value in zip(x, y) if line.dots and len(x) <= MOST else ():
        told = el("title", f"{line.label}: {value:.5g} at {at:,.0f} images")
        parts.append(
            el(
                "circle",
                told,
                cx=f"{across(at):.1f}",
                cy=f"{up(value):.1f}",
                r="3.4",
                class_=f"dot {colour}",
            )
        )
    return parts
