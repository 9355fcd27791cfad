"""The one primitive for waiting: every wait has a name, an owner and a deadline, and is shown while it lasts (I8).

    batch = await waits.wait(batches.get(), name="batch", owner="batch_loop", deadline_s=None)

Silent hangs are the most reported failure of this field. `current()` is what the terminal shows; every wait that ends
is recorded as a span; one past its deadline raises with its name. Both processes use it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from protocol.errors import HeadwayError
from protocol.logs import event

log = logging.getLogger(__name__)

T = TypeVar("T")
SPANS_KEPT = 10_000
REMIND_S = 10.0
"""A wait is logged when it has lasted so long, then each time it has doubled."""


class WaitTimeout(HeadwayError, TimeoutError):
    """A wait passed its deadline. The text names it, its owner and how long it lasted."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A wait going on now."""

    name: str
    owner: str
    """Who can end it."""
    started_s: float
    deadline_s: float | None
    """Seconds after `started_s`."""

    def describe(self, now_s: float) -> str:
        """`publish (publisher) for 3 s of 120 s`."""
        limit = "" if self.deadline_s is None else f" of {self.deadline_s:g} s"
        return f"{self.name} ({self.owner}) for {now_s - self.started_s:.0f} s{limit}"


@dataclass(frozen=True, slots=True)
class Span:
    """A wait that ended."""

    name: str
    owner: str
    started_s: float
    ended_s: float


class Waits:
    """Registry of one process's waits. `clock` is monotonic seconds (a virtual one in simulations)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._current: dict[int, Waiting] = {}
        self._next = 0
        self._ended_s: dict[str, float] = {}
        self.spans: deque[Span] = deque(maxlen=SPANS_KEPT)

    async def wait(self, awaitable: Awaitable[T], *, name: str, owner: str, deadline_s: float | None) -> T:
        """Await, visibly.

        Raises:
            WaitTimeout: it took longer than `deadline_s` seconds.
        """
        key, self._next = self._next, self._next + 1
        waiting = Waiting(name, owner, self.clock(), deadline_s)
        self._current[key] = waiting
        try:
            async with asyncio.timeout(deadline_s) as limit:
                return await awaitable
        except TimeoutError as error:
            if limit.expired():
                raise WaitTimeout(f"waited {deadline_s:g} s for {name} ({owner})") from error
            raise
        finally:
            del self._current[key]
            now = self.clock()
            self._ended_s[name] = self._ended_s.get(name, 0.0) + now - waiting.started_s
            self.spans.append(Span(name, owner, waiting.started_s, now))

    def current(self) -> list[Waiting]:
        """Waits going on now, longest first."""
        return sorted(self._current.values(), key=lambda w: w.started_s)

    def total_s(self, name: str) -> float:
        """Seconds spent in waits of that name, the running ones included."""
        now = self.clock()
        running = sum(now - w.started_s for w in self._current.values() if w.name == name)
        return self._ended_s.get(name, 0.0) + running


class Reminders:
    """Puts long waits into the log while they last: who finds a process standing still finds there what for."""

    def __init__(self) -> None:
        self._due_s: dict[Waiting, float] = {}

    def tell(self, current: Sequence[Waiting], now_s: float) -> list[Waiting]:
        """Log which of the waits going on have become long, and return them. Call it every second or so."""
        self._due_s = {w: self._due_s.get(w, w.started_s + REMIND_S) for w in current}
        told = [w for w in current if now_s >= self._due_s[w]]
        for w in told:
            self._due_s[w] = now_s + max(REMIND_S, now_s - w.started_s)
            event(log, "waiting", wait=w.name, owner=w.owner, seconds=now_s - w.started_s, deadline_s=w.deadline_s)
        return told
