"""The one primitive for waiting: every wait has a name, an owner and a deadline, and is shown while it lasts (I8).

    batch = await waits.wait(batches.get(), name="batch", owner="batch_loop", deadline_s=None)

Silent hangs are the most reported failure of this field. `current()` is what the terminal shows; every wait that ends
is recorded as a span; one past its deadline raises with its name. Both processes use it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from protocol.errors import HeadwayError

T = TypeVar("T")
SPANS_KEPT = 10_000


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
        self._clock = clock
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
        waiting = Waiting(name, owner, self._clock(), deadline_s)
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
            now = self._clock()
            self._ended_s[name] = self._ended_s.get(name, 0.0) + now - waiting.started_s
            self.spans.append(Span(name, owner, waiting.started_s, now))

    def current(self) -> list[Waiting]:
        """Waits going on now, longest first."""
        return sorted(self._current.values(), key=lambda w: w.started_s)

    def total_s(self, name: str) -> float:
        """Seconds spent in waits of that name, the running ones included."""
        now = self._clock()
        running = sum(now - w.started_s for w in self._current.values() if w.name == name)
        return self._ended_s.get(name, 0.0) + running
