"""A version rolls over the fleet: which servers have it staged and wait, and which may swap now. Pure.

    begin(version) -> staged(server) -> grant() gives the turn -> ended(server): live, failed or lost
                                                              '-> expire(): TURN_S without an answer

A swap pauses an engine, and a bad version could break it. So at most an eighth of the fleet swaps at once, one server
where there are fewer than 16, and who serves the oldest weights goes first: a server whose staged version was
superseded before its turn came is the first in line for the next. Those who had a turn for this version already come
last: one that fails every time must not keep the others from theirs. One that serves nothing pauses nobody: it gets its
turn at once, and takes none from the others. Servers are named by their connection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from protocol.versions import Version

TURN_S = 30.0
"""A turn that is not answered for so long goes to the next. Nothing else happens: perhaps it still ends well. Half of
what I8 allows for a step: a fleet that waits for its turn behind one that hangs must not look stalled."""
SERVERS_AT_ONCE = 8
"""One server in so many swaps at a time."""
OLDEST = Version(-1, -1)
"""Where a server without weights stands in the line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Permission to swap, given and not answered."""

    version: Version
    ends_s: float
    pauses: bool
    """Whether the server served when it got it: only such turns count."""


class Rollover:
    """The newest announced version on its way over the fleet."""

    def __init__(self) -> None:
        self.version: Version | None = None
        """The one that may be staged."""
        self.waiting: dict[bytes, None] = {}
        """Servers that have it staged, in the order in which they said so."""
        self.turns: dict[bytes, Turn] = {}
        self._tried: set[bytes] = set()
        """Servers that had a turn for the version."""
        self._checksums: dict[str, str] = {}
        """The first of each kind that was reported of the version."""

    @property
    def checksums(self) -> tuple[str, ...]:
        """What servers hold of the version, one of each kind."""
        return tuple(self._checksums[kind] for kind in sorted(self._checksums))

    def begin(self, version: Version) -> None:
        """A newer version was announced: whoever waits will stage that one, whoever swaps goes on."""
        if version != self.version:
            self.version = version
            self.waiting.clear()
            self._tried.clear()
            self._checksums.clear()

    def staged(self, server: bytes, version: Version) -> bool:
        """Note that a server waits; a turn that it had is over. False: that version is not the one rolling."""
        self.turns.pop(server, None)
        if version != self.version:
            return False
        self.waiting.setdefault(server)
        return True

    def ended(self, server: bytes, version: Version | None = None) -> None:
        """A turn was answered: the one for `version` (or for an older one), or whichever it was."""
        turn = self.turns.get(server)
        if turn is not None and (version is None or version >= turn.version):
            del self.turns[server]

    def left(self, server: bytes) -> None:
        """Forget a server."""
        self.turns.pop(server, None)
        self.waiting.pop(server, None)
        self._tried.discard(server)

    def expire(self, now_s: float) -> list[bytes]:
        """Take back the turns that were not answered in time; return whose they were."""
        late = [server for server, turn in self.turns.items() if now_s >= turn.ends_s]
        for server in late:
            del self.turns[server]
        return late

    def grant(self, live: Mapping[bytes, Version | None], now_s: float) -> list[bytes]:
        """Give out the turns that are free; return who may swap to `version` now.

        Args:
            live: what every connected server serves; None for one without weights.
            now_s: monotonic seconds.
        """
        if self.version is None:
            return []
        allowed = max(1, len(live) // SERVERS_AT_ONCE)
        granted = []
        for server in sorted(self.waiting, key=lambda server: (server in self._tried, live[server] or OLDEST)):
            pauses = live[server] is not None
            if pauses and sum(turn.pauses for turn in self.turns.values()) >= allowed:
                continue  # but one that serves nothing may stand behind it
            self._tried.add(server)
            del self.waiting[server]
            self.turns[server] = Turn(self.version, now_s + TURN_S, pauses)
            granted.append(server)
        return granted

    def reported(self, version: Version, checksum: str) -> str | None:
        """Remember the checksum of a server that is live; return the one it contradicts, if it does."""
        kind, colon, _ = checksum.partition(":")
        if version != self.version or not colon:
            return None
        first = self._checksums.setdefault(kind, checksum)
        return None if first == checksum else first
