"""How late the event loop runs (invariant I9): the gauge that every process shows and exports.

A callback that computes for 50 ms makes every timer due in that time up to 50 ms late, so lateness of a regular timer
is what is measured. Knows nothing of what else runs on the loop.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable

WINDOW = 600
"""Measurements kept: a minute at the default interval."""

LIMIT_MS = 50.0
"""No callback may take more (I9): lateness above it is shown as a fault."""


class LoopLag:
    """The last lateness measurements of one event loop. Written by `loop_lag_gauge`, read by whoever reports."""

    def __init__(self) -> None:
        self._late_s: deque[float] = deque(maxlen=WINDOW)

    def record(self, late_s: float) -> None:
        """Add a measurement, in seconds; a timer that fired early counts as on time."""
        self._late_s.append(max(0.0, late_s))

    def p99_ms(self) -> float:
        """Return the 99th percentile (nearest rank) over the window, in milliseconds; 0 before any measurement."""
        if not self._late_s:
            return 0.0
        rank = math.ceil(0.99 * len(self._late_s))
        return 1000.0 * sorted(self._late_s)[rank - 1]


async def loop_lag_gauge(
    gauge: LoopLag,
    interval_s: float = 0.1,
    *,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Measure until cancelled: sleep `interval_s`, record by how much longer it took.

    waits for: its own timer      produces: measurements in `gauge`
    """
    while True:
        due_s = clock() + interval_s
        await sleep(interval_s)
        gauge.record(clock() - due_s)
