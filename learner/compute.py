"""The compute thread: everything that touches the model runs here, one call at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from learner.model.host_memory import keep_freed_memory
from protocol.tasks import finish

P = ParamSpec("P")
T = TypeVar("T")


class Compute:
    """Call it with a function and its arguments. `busy_with` is what the screen shows."""

    def __init__(self) -> None:
        keep_freed_memory()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="compute")
        self.busy_with = ""

    async def __call__(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the function returns. A cancelled call still waits for it: the step boundary is the unit."""
        self.busy_with = function.__name__.replace("_", " ")
        try:
            loop = asyncio.get_running_loop()
            return await finish(loop.run_in_executor(self._thread, lambda: function(*args, **kwargs)))
        finally:
            self.busy_with = ""

    async def close(self) -> None:
        """End the thread after the call it is in."""
        await asyncio.get_running_loop().run_in_executor(None, self._thread.shutdown)
