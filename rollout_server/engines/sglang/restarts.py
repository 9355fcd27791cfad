"""When SGLang is started again: at once, but not again and again for nothing. Pure."""

from __future__ import annotations

PAUSES_S = (0.0, 1.0, 5.0, 15.0, 30.0)
"""Before the start that follows so many lives in vain, less one; the last one repeats."""
HOPELESS = 3
"""After so many lives in vain, one after another, the next will hardly be better."""


class Restarts:
    """Counts lives in vain: those that ended before a group came out of them, and starts that failed."""

    def __init__(self) -> None:
        self.in_vain = 0

    def ended(self, *, served: bool) -> float:
        """A life has ended, or did not begin. Return the pause before the next, in seconds."""
        self.in_vain = 0 if served else self.in_vain + 1
        return PAUSES_S[min(max(0, self.in_vain - 1), len(PAUSES_S) - 1)]
