"""The rollout servers as the learner sees them: health, version, room. Pure: the time comes as an argument.

    joined -> JOINING      no lease before it is live at a version of this lineage; so again when it has lost that
    live   -> HEALTHY
    silent for half of liveness_s -> SUSPECT    keeps its leases, gets no new one; any message makes it HEALTHY again
    silent for liveness_s         -> removed    its leases are given to others
    drain  -> DRAINING     finishes what it has

Room is counted in samples, so that a straggler holds one sample's room; slots are counted in groups (ledger.py). How
many samples of its unanswered groups have ended a server says itself, with every group and every heartbeat: to count
them all until their group is answered would leave the places empty that wait for the stragglers of many groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice

from protocol.identity import process_of
from protocol.messages import Hello, ServerStatus
from protocol.versions import Lineage, Version

EVAL_SHARE = 4
"""One part in so many of a server's room is reserved for evaluation."""


class Health(StrEnum):
    """State of a connected server."""

    JOINING = "joining"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DRAINING = "draining"


@dataclass(slots=True, kw_only=True)
class Server:
    """One connected server."""

    peer: bytes
    hello: Hello
    joined_s: float
    heard_s: float
    live: Version | None = None
    """The version it reported, if that belongs to the lineage."""
    draining: bool = False
    status: ServerStatus | None = None
    leased_since_status: int = 0
    """Samples leased to it that its last status does not count."""
    outstanding: dict[str, int] = field(default_factory=dict)
    """Samples of each group leased to it, by group id."""
    samples: int = 0
    """Of all these: leased to it and not answered."""
    eval_outstanding: set[str] = field(default_factory=set)

    @property
    def name(self) -> str:
        """The server's own name."""
        return self.hello.server

    @property
    def process(self) -> str:
        """The process behind the connection: two of one name are two."""
        return process_of(self.hello.session)

    @property
    def load(self) -> int:
        """Samples that run on it or wait there for a place, as far as it has said: most of a group may have ended."""
        if self.status is None:
            return self.samples
        known = self.status.samples_running + self.status.samples_waiting + self.leased_since_status
        return min(self.samples, known)

    @property
    def training_samples(self) -> int:
        """Those of them that are to train."""
        return sum(samples for held_id, samples in self.outstanding.items() if held_id not in self.eval_outstanding)


class Fleet:
    """All connected servers."""

    def __init__(self, lineage: Lineage, *, liveness_s: float) -> None:
        self.lineage = lineage
        self.liveness_s = liveness_s
        self.servers: dict[bytes, Server] = {}

    def join(self, peer: bytes, hello: Hello, now_s: float) -> Server:
        """Add a server that was welcomed."""
        live = hello.live if hello.live is not None and hello.live in self.lineage else None
        server = Server(peer=peer, hello=hello, joined_s=now_s, heard_s=now_s, live=live)
        self.servers[peer] = server
        return server

    def heard(self, peer: bytes, now_s: float) -> Server | None:
        """Any message is a sign of life. Return the sender, or None when it has not said Hello."""
        server = self.servers.get(peer)
        if server is not None:
            server.heard_s = now_s
        return server

    def reported(self, server: Server, status: ServerStatus | None) -> None:
        """Note how a server did when it sent that: of its leases, which arrive in order, it may not have had the last.

        Every group that it had finished has come before its status, so what it has in flight are the first of those
        that are outstanding. Groups that were called back meanwhile shift this, but their samples are counted too.
        """
        had = 0 if status is None else status.groups_in_flight
        server.status, server.leased_since_status = status, sum(islice(server.outstanding.values(), had, None))

    def named(self, name: str) -> Server | None:
        """The connected server of that name."""
        return next((s for s in self.servers.values() if s.name == name), None)

    def leave(self, peer: bytes) -> list[str]:
        """Remove a server and return the group ids it still held."""
        server = self.servers.pop(peer, None)
        return [] if server is None else list(server.outstanding)

    def silent(self, now_s: float) -> list[Server]:
        """Servers to declare dead."""
        return [s for s in self.servers.values() if now_s - s.heard_s > self.liveness_s]

    def health(self, server: Server, now_s: float) -> Health:
        """State of one server now."""
        if server.draining:
            return Health.DRAINING
        if now_s - server.heard_s > self.liveness_s / 2:
            return Health.SUSPECT
        return Health.JOINING if server.live is None else Health.HEALTHY

    def went_live(self, peer: bytes, version: Version) -> bool:
        """Note a version that a server serves now; False when it is not of this lineage or goes backwards (I5)."""
        server = self.servers[peer]
        if version not in self.lineage or (server.live is not None and version < server.live):
            return False
        server.live = version
        return True

    def lost_weights(self, peer: bytes) -> None:
        """A server serves no version any more: it gets no lease before it reports one."""
        self.servers[peer].live = None

    def choose(
        self, *, min_policy_version: int, samples: int, now_s: float, exact: bool = False, reserve: bool = False,
        most_training: int = 0,
    ) -> Server | None:  # fmt: skip
        """The admissible server with most room for a group of that many samples, or None.

        A server is sent as much again as it has room for, at least one group: whoever ends there leaves its place to
        the next one at once. `reserve` is for eval leases: a quarter of the room is theirs, whether training fills the
        rest or not. `exact` asks for that very version. `most_training` is a knob: samples that one server may be
        leased for training; 0: what it has room for.
        """
        best: Server | None = None
        most = 0
        for server in self.servers.values():
            live = server.live
            if live is None or live.policy_version < min_policy_version:
                continue
            if exact and live.policy_version != min_policy_version:
                continue
            load, room = server.load, server.hello.room
            if best is not None and room - load <= most:
                continue
            if reserve:
                has_room = len(server.eval_outstanding) * samples < max(samples, room // EVAL_SHARE)
            else:
                has_room = load < room + max(room, samples)
            if most_training and server.training_samples + samples > most_training:
                has_room = False
            if has_room and self.health(server, now_s) is Health.HEALTHY:
                best, most = server, room - load
        return best

    def assign(self, server: Server, group_id: str, samples: int, *, evaluation: bool = False) -> None:
        """The server was sent that lease."""
        server.samples += samples - server.outstanding.get(group_id, 0)
        server.outstanding[group_id] = samples
        server.leased_since_status += samples
        if evaluation:
            server.eval_outstanding.add(group_id)

    def answered(self, peer: bytes, group_id: str) -> None:
        """The server has sent that group, or given it back: it holds the lease no longer, if it did."""
        server = self.servers.get(peer)
        if server is not None:
            server.samples -= server.outstanding.pop(group_id, 0)
            server.eval_outstanding.discard(group_id)

    def release(self, group_id: str) -> Server | None:
        """Nobody works on that group any more. Return who did."""
        for server in self.servers.values():
            if group_id in server.outstanding:
                server.samples -= server.outstanding.pop(group_id)
                server.eval_outstanding.discard(group_id)
                return server
        return None

    def holder(self, group_id: str) -> Server | None:
        """Who was leased that group."""
        return next((s for s in self.servers.values() if group_id in s.outstanding), None)
