"""Whether an engine with work to do still does it. Pure: the time is an argument."""

from __future__ import annotations


class Progress:
    """Watches a counter of work done.

    Args:
        stall_s: so long without a change is suspicious.
        now_s: monotonic seconds.
    """

    def __init__(self, stall_s: float, now_s: float) -> None:
        self._stall_s = stall_s
        self._moved_s = now_s
        self._work: object = None

    def note(self, work: object, now_s: float, *, busy: bool) -> None:
        """Note how much is done. An engine that has nothing to do, or is being swapped, owes no progress."""
        if work != self._work or not busy:
            self._work, self._moved_s = work, now_s

    def stalled(self, now_s: float) -> bool:
        """Whether it stands still for too long."""
        return now_s - self._moved_s > self._stall_s
