"""Whether an engine with work to do still does it, and still has it. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Iterable


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


class RollCall:
    """Whether an engine still has what it was given, by how many requests it says it has.

    It says no names, and counts late: a request on its way in, or an answer on its way out, is in neither count. So
    only requests count here that were unanswered at every look of `patience_s`, against the most that the engine had at
    any of them. Requests that come meanwhile hide a loss, but not for ever: what is lost keeps its seat. The count
    is the least that it can be: who was still on the way in at the last look before a loss may be among the lost.

    Args:
        patience_s: a loss must show for so long.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._begun_s = 0.0
        self._unanswered: set[str] = set()
        """At every look since then."""
        self._most_held = 0

    def note(self, unanswered: Iterable[str], *, held: int, now_s: float) -> int:
        """Note a look; return how many requests are lost at least.

        Args:
            unanswered: requests that wait for an answer, just after the engine said how many it has.
            held: requests that it has, running or queueing, whoever they are of.
            now_s: monotonic seconds.
        """
        still = self._unanswered & set(unanswered)
        most_held = max(self._most_held, held)
        if len(still) <= most_held:
            self._begun_s, self._unanswered, self._most_held = now_s, set(unanswered), held
            return 0
        self._unanswered, self._most_held = still, most_held
        return len(still) - most_held if now_s - self._begun_s >= self._patience_s else 0
