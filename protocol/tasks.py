"""How a process runs: one event loop (uvloop where it exists), one TaskGroup, one cause when it fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from protocol.errors import HeadwayError

T = TypeVar("T")
log = logging.getLogger(__name__)


def run_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run `main` to its end. Of several tasks that failed together, the first cause is raised, alone.

    Raises:
        BaseException: whatever ended it; siblings that only were cancelled are not mentioned.
    """
    try:
        import uvloop  # not on every platform

        factory: Callable[[], asyncio.AbstractEventLoop] | None = uvloop.new_event_loop
    except ImportError:
        factory = None
    try:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main())
    except BaseExceptionGroup as group:
        causes = _leaves(group)
        known = [cause for cause in causes if isinstance(cause, (HeadwayError, OSError))]
        cause = (known or causes)[0]
        for other in causes:
            if other is not cause:
                log.warning("event=also_failed error=%r", other)
        raise cause from None


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


@contextlib.contextmanager
def on_signals(handler: Callable[[str], None], *numbers: signal.Signals) -> Any:
    """While inside, call `handler(name)` on the event loop for each signal received."""
    loop = asyncio.get_running_loop()
    for number in numbers:
        loop.add_signal_handler(number, handler, number.name)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def finish(task: asyncio.Future[T]) -> T:
    """Await `task` to its end even when the caller is cancelled meanwhile; the cancellation follows after it."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError as error:
            if task.cancelled():
                raise
            cancelled = error
        except BaseException:  # noqa: BLE001 - it belongs to the task, and is raised by result() below
            break
    if cancelled is not None:
        task.exception()  # retrieved: the cancellation is what the caller hears of
        raise cancelled
    return task.result()
