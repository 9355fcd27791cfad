"""An event loop whose clock jumps to the next timer instead of waiting: hours of a run in seconds, exactly.

Everything that waits for the running loop's time works on it unchanged: timers, deadlines, `asyncio.sleep`. Work that
is sent to the default executor is done on the spot. When everything waits and no timer is set, nothing can ever happen
again: that is a deadlock, and raised as one.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(RuntimeError):
    """Everything waits and no timer is set."""


class InlineExecutor(ThreadPoolExecutor):
    """Does its work when it is submitted, on the spot: `asyncio.to_thread` then takes no time and no thread."""

    def submit(self, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call `function` and return a future that is done."""
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:  # noqa: BLE001 - it belongs to whoever awaits the future
            future.set_exception(error)
        return future


class _JumpingSelector(selectors.DefaultSelector):
    """Looks at the sockets without waiting and moves the clock by the time it was allowed to wait."""

    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Return the sockets that are ready; where none is, let `timeout` seconds pass at once.

        Raises:
            Deadlock: none is ready, and the loop has no timer to wait for.
        """
        ready = super().select(0)
        if not ready and timeout is None:
            raise Deadlock("everything waits and no timer is set: a deadlock")
        if not ready and timeout is not None and timeout > 0:
            self.now_s += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Single-threaded: what is sent to the default executor is done at once; other threads are not waited for."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)
        self._clock_resolution = 1e-9
        self.set_default_executor(InlineExecutor())

    def time(self) -> float:
        """Virtual seconds since the loop was made."""
        return self._jumping.now_s

    async def shutdown_default_executor(self, *_: float | None) -> None:
        """It has no threads to wait for; a real one started to find that out may be slower than this clock."""


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock that starts at 0.

    Raises:
        Deadlock: nothing can happen any more.
    """
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
