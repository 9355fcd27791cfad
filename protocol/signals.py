"""A condition to wait for in asyncio: `wait` returns at the next `notify`. Owned by one event loop."""

from __future__ import annotations

import asyncio


class Signal:
    """Wakes every waiter at once, and keeps nothing: check the condition, then wait, with no await in between."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wake all who wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self) -> None:
        """Wait for the next notify."""
        await self._event.wait()
