"""What an engine has done, by the clock: integrals over time of what runs. Pure, the clock is passed in."""

from __future__ import annotations

from collections.abc import Callable


class Meter:
    """Told of every change; `settle` brings the integrals up to now.

    Args:
        room: samples at once that count as full.
        clock: monotonic seconds.
    """

    def __init__(self, room: int, clock: Callable[[], float]) -> None:
        self._room = room
        self._clock = clock
        self._since_s = clock()
        self._running = 0
        self._paused = False
        self.busy_s = self.paused_s = self.occupancy_s = 0.0
        self.tokens_finished = self.prompt_tokens = self.cached_prompt_tokens = 0

    def settle(self) -> None:
        """Add the time since the last change."""
        now_s = self._clock()
        elapsed_s, self._since_s = now_s - self._since_s, now_s
        if self._paused:
            self.paused_s += elapsed_s
        elif self._running:
            self.busy_s += elapsed_s
        if self._paused or self._running:
            self.occupancy_s += elapsed_s * min(1.0, self._running / self._room)

    def runs(self, samples: int) -> None:
        """So many samples are in the engine from now on."""
        self.settle()
        self._running = samples

    def pauses(self, paused: bool) -> None:
        """The engine stands still, or goes on."""
        self.settle()
        self._paused = paused

    def finished(self, *, tokens: int, prompt: int, cached: int) -> None:
        """A sample has ended: its tokens, its prompt's, and those of the prompt that were there already."""
        self.tokens_finished += tokens
        self.prompt_tokens += prompt
        self.cached_prompt_tokens += cached
