"""Versions in the hands of the servers: who is told of them, who swaps when, and what came of it.

Belongs to the coordinator, runs on the event loop, never waits. Who may swap is decided by rollover.py, who fetches
from whom by relay_plan.py, who is live is kept in fleet.py; here they meet the messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from learner.batch_metrics import Row
from learner.fleet import Fleet, Health, Server
from learner.links import Links
from learner.relay_plan import LEARNER, Fetched, Holder, plan_relay, route
from learner.rollover import Rollover
from protocol.messages import (
    AnyMessage,
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.versions import Version


class Notice(Protocol):
    """Log an event and show it."""

    def __call__(self, name: str, text: str, **fields: object) -> None:
        """See Coordinator.notice."""


@dataclass(slots=True)
class Findings:
    """The worst that the servers have reported of a version."""

    version: Version
    pause_s: float = 0.0
    check_s: float = 0.0
    mismatch_kl: float = -math.inf
    """-inf: nobody has measured it."""
    mismatch: float = -math.inf


@dataclass(kw_only=True)
class WeightsDesk:
    """See the module's text. One per coordinator."""

    fleet: Fleet
    links: Links
    clock: Callable[[], float]
    send: Callable[[Server, AnyMessage], bool]
    notice: Notice
    went_live: Callable[[Version], None]
    """Told of every version that a server serves now."""
    key_of: Callable[[bytes], str]
    """A peer's public key; empty without keys."""
    live_reported: Callable[[str, WeightsLive], None] = lambda server, report: None
    """Told of every report that a version is live, with the server's name."""
    current: WeightsReady | None = None
    """The newest announced version: what a joining server is told."""
    rollover: Rollover = field(default_factory=Rollover)
    findings: Findings | None = None
    parents: dict[str, str] = field(default_factory=dict)
    """By server: whom it was told to fetch the newest version from first."""
    fetched: dict[str, Fetched] = field(default_factory=dict)
    """By server: what it said of the last version that it fetched."""
    made_s: dict[int, float] = field(default_factory=dict)
    """By policy_version: when the optimizer made those weights that no server serves yet."""
    live_s: float = math.nan
    """From the optimizer's step to the first server that samples with its weights, of the newest version live."""

    def made(self, policy_version: int) -> None:
        """The optimizer has made a version that will be published."""
        self.made_s[policy_version] = self.clock()

    def announce(self, ready: WeightsReady) -> None:
        """Tell every server of a version."""
        self.current = ready
        self.rollover.begin(ready.version)
        self.parents = {}
        servers = list(self.fleet.servers.values())
        self._tell(servers)

    def joined(self, server: Server) -> None:
        """Tell a server that was welcomed."""
        self.links.joined(server.name)
        if self.current is not None:
            self._tell([server])

    def left(self, server: Server) -> None:
        """Forget a server; its turn is free. How fast it was is remembered: it may come back."""
        self.links.left(server.name)
        self.rollover.left(server.peer)
        self.give_turns()

    def tick(self) -> None:
        """Take back turns that are not answered, and give them to the next."""
        turns = dict(self.rollover.turns)
        for peer in self.rollover.expire(self.clock()):
            name, turn = self.fleet.servers[peer].name, turns[peer]
            waited_s = turn.ends_s - turn.begun_s
            text = f"{name} has not swapped to version {turn.version} for {waited_s:.0f} s: the next one may"
            self.notice("turn_expired", text, server=name)
        self.give_turns()

    def give_turns(self) -> None:
        """Let the servers swap whose turn it is."""
        if not self.rollover.waiting:
            return
        live = {peer: self.fleet.servers[peer].live for peer in self.rollover.waiting}
        granted = self.rollover.grant(live, len(self.fleet.servers), self.clock())
        version = self.rollover.version
        for peer in granted:
            server = self.fleet.servers.get(peer)
            if server is not None and version is not None:  # else it left while the others were told
                self.send(server, WeightsSwap(version=version, checksums=self.rollover.checksums))

    def brings_seats(self, policy_version: int) -> bool:
        """Whether a server with free seats will serve that version soon."""
        servers, now_s = self.fleet.servers, self.clock()
        live = {peer: servers[peer].live for peer in self.rollover.waiting}
        for peer in self.rollover.soon(policy_version, live, len(servers), now_s):
            server = servers.get(peer)
            if server is None or server.load >= server.hello.room:
                continue
            if self.fleet.health(server, now_s) in (Health.JOINING, Health.HEALTHY):
                return True
        return False

    def handle(self, server: Server, message: WeightsStaged | WeightsLive | WeightsFailed | WeightsLost) -> None:
        """Act on what a server says of a version."""
        peer = server.peer
        match message:
            case WeightsStaged(version=version):
                if server.live is None or server.live < version:  # else it has come twice
                    self.rollover.staged(peer, version)
            case WeightsLive():
                self.rollover.swapped(peer, message.version, self.clock())
                self.links.live(server.name, message)
                self.live_reported(server.name, message)
                if self.fleet.went_live(peer, message.version):
                    self._note(server, message)
                    self._first_live(message.version.policy_version)
                    self.went_live(message.version)
            case WeightsFailed():
                self.rollover.failed(peer, message.version)
                text = f"{server.name} could not take version {message.version}: {message.reason}"
                self.notice("weights_failed", text, server=server.name, version=message.version)
            case WeightsLost():
                self.rollover.failed(peer)
                self.fleet.lost_weights(peer)
                self.notice("weights_lost", f"{server.name}: {message.reason}", server=server.name)
        self.give_turns()

    def metrics(self) -> Row:
        """What the servers have measured of the newest version that any of them is live at, the worst of each."""
        found = self.findings
        if found is None:
            return {}
        row: Row = {"weights/pause_s": found.pause_s, "weights/check_s": found.check_s}
        if not math.isnan(self.live_s):
            row["weights/live_s"] = self.live_s
        if found.mismatch_kl > -math.inf:
            row |= {"mismatch_kl": found.mismatch_kl, "mismatch_logprob": found.mismatch}
        return row

    def _first_live(self, policy_version: int) -> None:
        if policy_version in self.made_s:  # else another server was first, or the weights are a checkpoint's
            self.live_s = self.clock() - self.made_s[policy_version]
        self.made_s = {made: at_s for made, at_s in self.made_s.items() if made > policy_version}

    def _tell(self, servers: Sequence[Server]) -> None:
        """Announce the newest version to servers, each with the addresses to fetch it from."""
        assert self.current is not None, "there is nothing to tell"
        holders = {server.name: self._holder(server) for server in self.fleet.servers.values()}
        fetched = {name: found for name, found in self.fetched.items() if name in holders}
        planned = plan_relay(list(holders.values()), fetched)
        for server in servers:
            self.parents[server.name] = planned[server.name]
            ancestors = route(server.name, planned, holders)
            addresses = (*(holder.address for holder in ancestors), *self.current.addresses)
            keys = (*(holder.key for holder in ancestors), *("" for _ in self.current.addresses))
            ready = msgspec.structs.replace(self.current, addresses=addresses, address_keys=keys if any(keys) else ())
            self.send(server, ready)

    def _holder(self, server: Server) -> Holder:
        """Only who is here and stays passes anything on."""
        passes_on = self.fleet.health(server, self.clock()) in (Health.JOINING, Health.HEALTHY)
        address = server.hello.relay_address if passes_on else ""
        return Holder(server.name, address, self.key_of(server.peer))

    def _note(self, server: Server, live: WeightsLive) -> None:
        """Keep what a server has found, and compare its weights with those of the others."""
        if live.bytes:
            parent = self.parents.get(server.name, LEARNER)
            self.fetched[server.name] = Fetched(live.bytes, live.transfer_s, parent)
        other = self.rollover.reported(live.version, live.checksum)
        if other is not None:
            text = f"{server.name} holds other weights of version {live.version}: {live.checksum}, others {other}"
            self.notice("checksums_differ", text, server=server.name, version=live.version)
        if self.findings is None or self.findings.version < live.version:
            self.findings = Findings(live.version)
        found = self.findings
        if found.version == live.version:
            found.pause_s = max(found.pause_s, live.pause_s)
            found.check_s = max(found.check_s, live.check_s)
            if live.mismatch_kl is not None and live.mismatch is not None:
                found.mismatch_kl = max(found.mismatch_kl, live.mismatch_kl)
                found.mismatch = max(found.mismatch, live.mismatch)
