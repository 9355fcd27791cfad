"""Numbers, times and foreign text as a screen shows them. Pure; every function takes NaN, infinity and emptiness.

Names, notices and samples may hold anything a model or another host wrote: `printable` makes them harmless.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

NOTHING = "-"
"""What a missing value looks like."""

BLOCKS = "▁▂▃▄▅▆▇█"


def printable(text: str, limit: int = 200) -> str:
    """Escape what a terminal could act on (control, bidirectional, invisible characters) and cut to `limit`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return shown if len(text) <= limit and len(shown) <= limit else f"{shown[: limit - 3]}..."


def duration(seconds: float) -> str:
    """Format a time: `3.2 s`, `45 s`, `7:18`, `2:07:18`, `12 d`."""
    if not math.isfinite(seconds):
        return NOTHING
    if seconds < 9.95:
        return f"{max(0.0, seconds):.1f} s"
    whole = round(seconds)
    if whole < 100:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours < 100 else f"{hours // 24:,} d"


def score(value: float) -> str:
    """Format a reward: two decimals, and never wider than 8 characters."""
    if not math.isfinite(value):
        return NOTHING
    return f"{value:.2f}" if abs(value) < 9999.995 else f"{value:.1e}"


def quantity(value: float) -> str:
    """Format a count or a rate: `0.4`, `87`, `1,240`, `56.1k`, `7.3M`, `2.0G`."""
    if not math.isfinite(value):
        return NOTHING
    if 0 < value < 9.95:
        return f"{value:.1f}"
    if value < 9999.5:
        return f"{value:,.0f}"
    for size, unit in ((1e3, "k"), (1e6, "M"), (1e9, "G")):
        if value < 999.95 * size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.1e}"


def percent(ratio: float) -> str:
    """Format a share: `81 %`."""
    return f"{100 * ratio:.0f} %" if math.isfinite(ratio) else NOTHING


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw the whole history in at most `width` characters, from its lowest to its highest value.

    More values than characters are averaged in even bins; bins without a finite value are blank.
    """
    points = _bins(values, width)
    finite = [point for point in points if math.isfinite(point)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    if not 0 < high - low < math.inf:
        return "".join(BLOCKS[3] if math.isfinite(point) else " " for point in points)
    return "".join(
        BLOCKS[min(7, int(8 * (point - low) / (high - low)))] if math.isfinite(point) else " " for point in points
    )


def histogram(counts: Sequence[int]) -> str:
    """Draw one block per count, the largest full; a zero is a blank, anything else is seen."""
    largest = max(counts, default=0)
    if largest == 0:
        return ""
    return "".join(BLOCKS[min(7, 8 * count // largest)] if count else " " for count in counts)


def _bins(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [len(values) * i // width for i in range(width + 1)]
    return [_finite_mean(values[start:end]) for start, end in itertools.pairwise(edges)]


def _finite_mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan
