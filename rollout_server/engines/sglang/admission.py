"""How many samples SGLang is given at once, and who waits here instead of in its queue.

Too few leave it idle; too many fill its KV cache, and it throws running samples out to compute them again (a
retraction). The rule works on what SGLang reports: shrink to TRIM_TO of the cache once it is over TRIM_ABOVE, to what
runs while many queue in it, cut on a retraction; grow by a quarter each time the whole pool has turned over while the
cache is under GROW_BELOW (prime-rl has such a rule, 2026-08; samples under way are never called back here). It starts
with all the room: SGLang's own queue bears a few too many better than a user bears a slow start.
Pure but for the futures that wake who waits.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field

GROW_BELOW, TRIM_ABOVE, TRIM_TO = 0.6, 0.8, 0.7
GROWTH = 1.25
CUT = 0.8
"""Of the samples under way, after a retraction."""
QUEUED = 0.25
"""So many queueing in SGLang, of those that run, are too many."""


class Limit:
    """The number of samples at once; `room` at most, 1 at least.

    Args:
        room: what the user allows.
    """

    def __init__(self, room: int) -> None:
        self._room = self.value = room
        self._ended = 0
        """Samples that ended since the limit last moved."""
        self._full = True
        """Whether the limit was what kept samples waiting all that time."""
        self._cooling = False
        """It has just been lowered: what was decided must show its effect before it is lowered again."""

    def ended(self, *, retracted: bool, running: int) -> bool:
        """A sample has ended. True when the limit has moved.

        Args:
            retracted: SGLang threw it out at least once for want of memory.
            running: samples under way.
        """
        self._ended += 1
        self._cooling = self._cooling and self._ended < self.value // 2
        return retracted and self._shrink(int(CUT * running))

    def observe(self, *, usage: float, running: int, queued: int, waiting: int) -> bool:
        """Move the limit by what SGLang reports. True when it has moved.

        Args:
            usage: share of the KV cache in use.
            running: samples that SGLang has begun.
            queued: samples that it has been given and has not begun.
            waiting: samples that wait here.
        """
        if usage > TRIM_ABOVE:
            return self._shrink(int(running * TRIM_TO / usage))
        if usage > GROW_BELOW and queued > QUEUED * running:  # in an emptier cache they have only just come
            return self._shrink(running)
        self._full = self._full and waiting > 0
        if self._ended < self.value:
            return False
        grows = usage < GROW_BELOW and self._full and self.value < self._room
        self._ended, self._full = 0, True
        if grows:
            self.value = min(self._room, max(self.value + 1, int(self.value * GROWTH)))
        return grows

    def _shrink(self, target: int) -> bool:
        target = max(1, target)
        if self._cooling or target >= self.value:
            return False
        self.value, self._ended, self._full, self._cooling = target, 0, True, True
        return True


@dataclass(slots=True, eq=False)
class Seat:
    """One sample's place in the queue, later in SGLang."""

    group: object
    given: asyncio.Future[bool] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """True: go. False: the group was aborted."""


class Admission:
    """First come, first served, `limit` at once. `close` holds everybody back (a swap), `open` goes on.

    Args:
        limit: moves while this runs; call `admit` after it has.
    """

    def __init__(self, limit: Limit) -> None:
        self.limit = limit
        self.running = 0
        self.idle = asyncio.Event()
        """Set while no sample is in SGLang."""
        self.idle.set()
        self._waiting: deque[Seat] = deque()
        self._closed = False

    @property
    def waiting(self) -> int:
        """Samples without a seat."""
        return len(self._waiting)

    async def enter(self, group: object) -> bool:
        """Wait for a seat. False when the group was aborted meanwhile. Who got True must `leave`."""
        seat = Seat(group)
        self._waiting.append(seat)
        self.admit()
        try:
            return await seat.given
        except asyncio.CancelledError:
            if seat in self._waiting:
                self._waiting.remove(seat)
            elif seat.given.done() and not seat.given.cancelled() and seat.given.result():
                self.leave()
            raise

    def leave(self) -> None:
        """Give a seat back."""
        self.running -= 1
        if not self.running:
            self.idle.set()
        self.admit()

    def admit(self) -> None:
        """Give out the free seats."""
        while self._waiting and not self._closed and self.running < self.limit.value:
            seat = self._waiting.popleft()
            if not seat.given.done():  # else its sample is being cancelled
                self.running += 1
                self.idle.clear()
                seat.given.set_result(True)

    def abort(self, group: object) -> None:
        """Send the group's waiting samples away."""
        for seat in [seat for seat in self._waiting if seat.group is group]:
            self._waiting.remove(seat)
            if not seat.given.done():
                seat.given.set_result(False)

    def close(self) -> None:
        """Give out no seats until `open`."""
        self._closed = True

    def open(self) -> None:
        """Give out seats again."""
        self._closed = False
        self.admit()
