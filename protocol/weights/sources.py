"""Whom a fetch asks: the sources it was told of, which of them it uses, and when another one is worth a move. Pure.

The list is best first, and whoever stands behind somebody in it is nearer to the learner, who is last and has it all.
So a fetch only ever moves down the list: nobody waits in a circle. Whether the next one is much faster cannot be known
from here without asking: now and then it is asked for a small stretch (a trial). If it has that, and would have brought
three times what the source of the moment did over some blocks' time, the fetch moves there. A source that waits for the
bytes itself says so; that ends a trial without a verdict, so that everybody behind a slow server stays where they are
but the one who sits right behind it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Sequence

from protocol.weights.manifest import BLOCK_BYTES

TRIAL_S, TRIALS_MAX_S = 2.0, 16.0
"""A source is used for so long before the next one is tried; between trials it becomes twice as long, up to the max."""
TRIAL_LIMIT_S = 5.0
"""A trial that takes longer has failed."""
TRIAL_CHUNKS = 4
MUCH = 3.0
"""How many times faster another source must be. Two that share a link each see half of it: that is no reason."""
LEAST_WINDOW_S, MAX_WINDOW_S = 0.5, 30.0
RESOLUTION_S = 0.05
STRIKES = 3
"""Wrong blocks in a row after which a source is not asked again."""


class Sources:
    """The addresses of one fetch.

    Args:
        addresses: Best first; the last one is the anchor, which is never shut out.
        shut_out: Those that are not asked.
    """

    def __init__(self, addresses: Sequence[str], shut_out: Container[str] = ()) -> None:
        self._addresses = [a for a in addresses[:-1] if a not in shut_out] + list(addresses[-1:])
        self._current = 0

    def __len__(self) -> int:
        return len(self._addresses)

    @property
    def current(self) -> str | None:
        """Who is asked; None: nobody has it any more."""
        return self._addresses[self._current] if self._addresses else None

    @property
    def next(self) -> str | None:
        """Who stands behind it, if anybody does."""
        following = self._addresses[self._current + 1 : self._current + 2]
        return following[0] if following else None

    def is_anchor(self, address: str) -> bool:
        """Whether it is the last resort."""
        return address == self._addresses[-1]

    def move_on(self) -> None:
        """Ask the next one; after the last, the first again."""
        self._current = (self._current + 1) % len(self._addresses)

    def remove(self, address: str) -> None:
        """Never ask that one again in this fetch."""
        index = self._addresses.index(address)
        del self._addresses[index]
        self._current -= index < self._current
        self._current = self._current % len(self._addresses) if self._addresses else 0


class Pace:
    """What one source has delivered, over time, and when to try the next one."""

    def __init__(self, now_s: float) -> None:
        self._times_s, self._totals = [now_s], [0]
        self._total = 0
        self._interval_s = TRIAL_S
        self.next_trial_s = now_s + TRIAL_S

    def delivered(self, now_s: float, nbytes: int) -> None:
        """Note bytes that came."""
        self._total += nbytes
        if now_s - self._times_s[-1] >= RESOLUTION_S:
            self._times_s.append(now_s)
            self._totals.append(self._total)

    def tried(self, now_s: float) -> None:
        """The next one was tried, and the fetch stayed."""
        self._interval_s = min(2 * self._interval_s, TRIALS_MAX_S)
        self.next_trial_s = now_s + self._interval_s

    def is_far_below(self, nbytes: int, seconds: float, now_s: float) -> bool:
        """Whether a source that brings `nbytes` in so many seconds is so much faster that the fetch should move.

        What counts is what came here in the time in which that one would bring three blocks. Without so much past, no.
        """
        rate = nbytes / max(seconds, 1e-3)
        window_s = min(max(LEAST_WINDOW_S, 3 * BLOCK_BYTES / rate), MAX_WINDOW_S)
        begin_s = now_s - window_s
        if begin_s < self._times_s[0]:
            return False
        before = self._totals[bisect_right(self._times_s, begin_s) - 1]
        return self._total - before < rate * window_s / MUCH
