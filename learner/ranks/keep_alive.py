"""Rank 0's sign of life while there is nothing to train, by which it also learns that another rank has died."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from learner.compute import Compute

KEEP_ALIVE_S = 5.0
"""Far below any useful collective_timeout_s, for which the others wait for a command."""


async def keep_alive_loop(send: Callable[[], None], compute: Compute) -> None:
    """Send one sign after another, on the compute thread: between commands, never inside one.

    waits for: its own timer, the compute thread      produces: nothing, or the error that ends the run

    Raises:
        RankLost: a rank is gone.
    """
    while True:
        await asyncio.sleep(KEEP_ALIVE_S)
        await compute(send)
