"""I8 in production: is the step still advancing? Pure: the time comes as an argument.

With a healthy server and no new fault a step takes at most max(60 s, 5 x the median step). Longer is counted and said,
with every wait that is going on: silent hangs are the most reported failure of this field.
"""

from __future__ import annotations

import statistics
from collections import deque

LEAST_S = 60.0
MEDIANS = 5.0
STEPS_KEPT = 50


class Progress:
    """Watches the number of trained or skipped steps."""

    def __init__(self, now_s: float) -> None:
        self._durations: deque[float] = deque(maxlen=STEPS_KEPT)
        self._advanced_s = now_s
        self._serverless_s = now_s
        self._steps = 0
        self._said = False

    @property
    def limit_s(self) -> float:
        """How long a step may take."""
        return max(LEAST_S, MEDIANS * statistics.median(self._durations)) if self._durations else 2 * LEAST_S

    def stalled(self, steps: int, now_s: float, *, healthy: bool) -> bool:
        """Note how many steps are done; True once per stall. Time without a healthy server does not count."""
        if steps != self._steps:
            self._durations.append(now_s - self._advanced_s)
            self._steps, self._advanced_s, self._said = steps, now_s, False
        if not healthy:
            self._advanced_s = now_s
        if self._said or now_s - self._advanced_s <= self.limit_s:
            return False
        self._said = True
        return True

    def serverless_s(self, now_s: float, *, connected: bool) -> float:
        """Seconds since a server was last connected."""
        if connected:
            self._serverless_s = now_s
        return now_s - self._serverless_s
