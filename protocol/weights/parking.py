"""Requests for bytes that are not here yet, kept until they are: the memory of a server that passes versions on. Pure.

Bounded, whoever asks: a fetcher has two requests outstanding, so nobody needs more than a few places here, and what
waits is a name and two numbers, not bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from protocol.versions import Version

PARKED_PER_PEER = 4
PARKED_AT_MOST = 1024
TELL_S = 1.0
"""Whoever waits is told so at once, and so often: silence would look like death."""
UNKNOWN_S = 30.0
"""A request for a version that nobody has announced here yet is given up after so long."""


@dataclass(slots=True)
class Parked:
    """What is left of a request: bytes [offset, end)."""

    peer: bytes
    version: Version
    base: Version | None
    offset: int
    end: int
    since_s: float
    told_s: float


class Parking:
    """All requests that wait, in the order they came."""

    def __init__(self) -> None:
        self._parked: list[Parked] = []

    def __len__(self) -> int:
        return len(self._parked)

    def add(self, parked: Parked) -> bool:
        """Keep a request; False if its peer, or everybody together, has too many waiting already."""
        theirs = sum(other.peer == parked.peer for other in self._parked)
        if theirs >= PARKED_PER_PEER or len(self._parked) >= PARKED_AT_MOST:
            return False
        self._parked.append(parked)
        return True

    def take_all(self) -> list[Parked]:
        """Hand all of them over: those that still wait are added again."""
        taken, self._parked = self._parked, []
        return taken
