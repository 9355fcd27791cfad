"""One live screen on a terminal; anywhere else plain lines: one a step, and one for each thing worth a notice.

Knows only `RunView`; what it looks like is in render.py. A terminal that goes away silences the screen and never ends
the run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from learner.dashboard.render import render, step_line, waiting_line
from learner.dashboard.text import printable
from learner.dashboard.view import RunView

FIRST_REMINDER_S = 10.0
"""Off a terminal, a wait for servers is said at once, then after this long, then each time it has doubled."""


class Screen:
    """Where the run is shown. A context manager: leaving it puts the terminal back in order.

    Example:
        >>> with Screen() as screen:                                     # doctest: +SKIP
        ...     screen.show(view)         # twice a second
        ...     screen.print_step(view)   # once a step
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or _PatientConsole()
        self.live = (
            self._console.is_terminal
            and not self._console.is_dumb_terminal
            and self._console.encoding.startswith("utf")
        )
        """Whether there is a live screen; else plain lines."""
        self._display = Live(console=self._console, auto_refresh=False, vertical_overflow="crop")
        self._remind_at_s = 0.0
        self._said: frozenset[str] = frozenset()
        """The notices of the last look."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.live:
            with contextlib.suppress(OSError):  # the terminal may have gone since the last look
                self._display.stop()

    def show(self, view: RunView) -> None:
        """Draw the moment. Off a terminal new notices are said, and a wait for servers at growing intervals.

        A look shows the last few notices only: a flood of them cannot flood the output.
        """
        if self.live:
            self._draw(view)
            return
        for notice in dict.fromkeys(view.notices):
            if notice not in self._said:
                self._print(printable(notice))
        self._said = frozenset(view.notices)
        if view.servers:
            self._remind_at_s = 0.0
        elif view.serverless_s >= self._remind_at_s:
            self._remind_at_s = max(FIRST_REMINDER_S, 2 * view.serverless_s)
            self._print(waiting_line(view))

    def print_step(self, view: RunView) -> None:
        """Say in one line how the last step went; a live screen shows it anyway."""
        if not self.live:
            self._print(step_line(view))

    def print_notice(self, text: str) -> None:
        """Say it in one line; a live screen shows the view's notices."""
        if not self.live:
            self._print(printable(text))

    def _draw(self, view: RunView) -> None:
        try:
            if not self._display.is_started:
                self._display.start()
            self._display.update(render(view, self._console.width, self._console.height), refresh=True)
        except OSError:  # the terminal has gone (its ssh session ended): the run goes on
            self.live = False
            self._console.quiet = True

    def _print(self, line: str) -> None:
        encoding = self._console.encoding
        line = line.encode(encoding, "backslashreplace").decode(encoding)
        try:
            self._console.print(Text(line), soft_wrap=True)
        except OSError:  # as above
            self._console.quiet = True


async def screen_loop(
    make_view: Callable[[], RunView],
    screen: Screen,
    interval_s: float = 0.5,
    *,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Show the run until cancelled.

    waits for: its own timer      produces: what the user sees
    """
    while True:
        screen.show(make_view())
        await sleep(interval_s)


class _PatientConsole(Console):
    """A console whose reader may leave (`headway-learner train | head`): it falls silent instead of exiting."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
