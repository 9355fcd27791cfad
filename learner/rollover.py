"""A version rolls over the fleet: which servers have it staged and wait, and which may swap now. Pure.

    begin(version) -> staged(server) -> grant() gives the turn -> swapped(server), or failed(server)
                                                              '-> expire(): turn_s without an answer

A swap pauses an engine, and a bad version could break it. So at most an eighth of the fleet swaps at once, one server
where there are fewer than 16, and who had no turn for longest goes first: of servers that swap as they should that is
who serves the oldest weights, those that fail every time do not keep the others from theirs, and a server whose staged
version was superseded before its turn came is the first in line for the next. One that serves nothing pauses nobody: it
gets its turn at once, and takes none from the others. Servers are named by their connection.

How long a swap may take is seen from those before it: a large model loads for a minute, `drain` waits for samples. A
turn lasts three times what is usual. When it is over the next server swaps, and nothing else happens: the late one
keeps its leases (whether it is alive its heartbeats say), and its answer counts whenever it comes. The server itself
gives a load up after 20 minutes, and says so.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from protocol.versions import Version

TURN_S = 30.0
"""Of a turn at least, and while no swap has been seen. Half of what I8 allows for a step: a fleet that waits for its
turn behind one that hangs must not look stalled."""
MAX_TURN_S = 600.0
"""Of a turn at most: a fleet does not wait longer for one that hangs, however slow it once was. SGLang's limit of one
load; half of the server's own limit."""
USUAL_SWAPS = 3.0
"""A turn lasts so many times the median of the last swaps: one that hung once does not make the next hang longer."""
SWAPS_REMEMBERED = 16
SOON_S = 1.0
"""As late as news of free seats may be anyway, with the usual heartbeat."""
SERVERS_AT_ONCE = 8
"""One server in so many swaps at a time."""
OLDEST = Version(-1, -1)
"""Where a server without weights stands in the line."""


@dataclass(frozen=True, slots=True)
class Turn:
    """Permission to swap, given and not answered."""

    version: Version
    begun_s: float
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
        self._late: dict[bytes, Turn] = {}
        """Turns that are over, and whose servers have not answered yet."""
        self._swaps_s: deque[float] = deque(maxlen=SWAPS_REMEMBERED)
        """How long the last swaps took, from turn to live."""
        self._turns_given = 0
        self._last_turn: dict[bytes, int] = {}
        """By server: which of all turns was its last."""
        self._checksums: dict[str, str] = {}
        """The first of each kind that was reported of the version."""

    @property
    def turn_s(self) -> float:
        """How long a turn that is given now may last."""
        return min(MAX_TURN_S, max(TURN_S, USUAL_SWAPS * self.usual_s))

    @property
    def usual_s(self) -> float:
        """How long swaps take; 0 while none has been seen."""
        return median(self._swaps_s) if self._swaps_s else 0.0

    def soon(
        self, policy_version: int, live: Mapping[bytes, Version | None], servers: int, now_s: float
    ) -> Iterator[bytes]:
        """Yield who will serve that version, or a newer one, within SOON_S if swaps take as long as they usually do.

        Args:
            policy_version: the oldest that would do.
            live: what every server that waits serves; None for one without weights.
            servers: how many are connected.
            now_s: monotonic seconds.
        """
        usual_s = self.usual_s
        free_s = [0.0] * (self._at_once(servers) - sum(turn.pauses for turn in self.turns.values()))
        for server, turn in self.turns.items():
            left_s = usual_s - (now_s - turn.begun_s)
            if left_s < -SOON_S:
                continue  # it may hang: nobody knows when its place will be free
            if turn.pauses:
                free_s.append(max(0.0, left_s))
            if left_s <= SOON_S and turn.version.policy_version >= policy_version:
                yield server
        if self.version is None or self.version.policy_version < policy_version:
            return
        heapq.heapify(free_s)
        for server in self._line(live):
            begins_s = 0.0
            if live[server] is not None:
                if not free_s:
                    continue
                begins_s = heapq.heappop(free_s)
                heapq.heappush(free_s, begins_s + usual_s)
            if begins_s + usual_s <= SOON_S:
                yield server

    def _at_once(self, servers: int) -> int:
        """How many may swap at once."""
        return max(1, servers // SERVERS_AT_ONCE)

    def _line(self, live: Mapping[bytes, Version | None]) -> list[bytes]:
        """Who waits, in the order of their turns."""
        return sorted(self.waiting, key=lambda server: (self._last_turn.get(server, 0), live[server] or OLDEST))

    @property
    def checksums(self) -> tuple[str, ...]:
        """What servers hold of the version, one of each kind."""
        return tuple(self._checksums[kind] for kind in sorted(self._checksums))

    def begin(self, version: Version) -> None:
        """A newer version was announced: whoever waits will stage that one, whoever swaps goes on."""
        if version != self.version:
            self.version = version
            self.waiting.clear()
            self._checksums.clear()

    def staged(self, server: bytes, version: Version) -> bool:
        """Note that a server waits; a turn that it had is over. False: that version is not the one rolling."""
        self._forget(server)
        if version != self.version:
            return False
        self.waiting.setdefault(server)
        return True

    def swapped(self, server: bytes, version: Version, now_s: float) -> None:
        """A server serves that version now: its turn for it, or for an older one, is answered, even if it was late."""
        turn = self.turns.get(server) or self._late.get(server)
        if turn is None or version < turn.version:
            return
        if turn.pauses:  # else it may have had to start its engine first
            self._swaps_s.append(now_s - turn.begun_s)
        self._forget(server)

    def failed(self, server: bytes, version: Version | None = None) -> None:
        """A turn came to nothing: the one for `version` (or for an older one), or whichever it was."""
        turn = self.turns.get(server) or self._late.get(server)
        if turn is not None and (version is None or version >= turn.version):
            self._forget(server)

    def left(self, server: bytes) -> None:
        """Forget a server."""
        self._forget(server)
        self.waiting.pop(server, None)
        self._last_turn.pop(server, None)

    def expire(self, now_s: float) -> list[bytes]:
        """Take back the turns that were not answered in time; return whose they were."""
        late = [server for server, turn in self.turns.items() if now_s >= turn.ends_s]
        for server in late:
            self._late[server] = self.turns.pop(server)
        return late

    def _forget(self, server: bytes) -> None:
        self.turns.pop(server, None)
        self._late.pop(server, None)

    def grant(self, live: Mapping[bytes, Version | None], servers: int, now_s: float) -> list[bytes]:
        """Give out the turns that are free; return who may swap to `version` now.

        Args:
            live: what every server that waits serves; None for one without weights.
            servers: how many are connected.
            now_s: monotonic seconds.
        """
        if self.version is None or not self.waiting:
            return []
        free = self._at_once(servers) - sum(turn.pauses for turn in self.turns.values())
        if free <= 0 and all(live[server] is not None for server in self.waiting):
            return []
        granted = []
        for server in self._line(live):
            pauses = live[server] is not None
            if pauses and free <= 0:
                continue  # but one that serves nothing may stand behind it
            free -= pauses
            self._turns_given += 1
            self._last_turn[server] = self._turns_given
            del self.waiting[server]
            self.turns[server] = Turn(self.version, now_s, now_s + self.turn_s, pauses)
            granted.append(server)
        return granted

    def reported(self, version: Version, checksum: str) -> str | None:
        """Remember the checksum of a server that is live; return the one it contradicts, if it does."""
        kind, colon, _ = checksum.partition(":")
        if version != self.version or not colon:
            return None
        first = self._checksums.setdefault(kind, checksum)
        return None if first == checksum else first
