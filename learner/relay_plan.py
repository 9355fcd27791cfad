"""Who fetches new weights from whom: a chain of servers behind the learner, so that its uplink carries one copy. Pure.

    learner --> s1 --> s2 --> ... --> sn        every link carries every byte once
                                     '--> leaf  servers that pass nothing on, and slow ones, from the last on

Servers pass on each block as soon as it is verified, so a chain of n is done n - 1 blocks after its first server. Where
that is longer than a tree of two takes, whose every link carries two copies (many servers, a small version), it is a
tree. Each server is told of the nearest ones before it, then of the learner, who has everything: who loses one asks the
next, and nobody ever asks somebody behind it, so nobody waits in a circle.

A server is slow when its last version came at less than half the speed at which it came to the one before it (for the
first: to most). Who merely sits behind a slow one is as slow as that one, and not slow by this. A slow one is a leaf.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from protocol.addresses import WILDCARD_HOSTS, is_local, parse_address, tcp_address
from protocol.errors import ConfigError
from protocol.weights.manifest import BLOCK_BYTES

SLOW = 0.5
ANCESTORS = 3
"""Servers that one is told of: so many may die at once before the learner is asked for another copy."""
LEARNER = ""
"""Its place among the names of servers."""


@dataclass(frozen=True, slots=True)
class Holder:
    """A server as the plan sees it."""

    name: str
    address: str
    """Where it passes versions on; empty: it does not."""
    key: str = ""
    """Public key of that address; empty without keys."""


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a server said of the last version that it fetched."""

    nbytes: int
    seconds: float
    parent: str
    """Whom it was told to fetch it from first."""

    @property
    def rate(self) -> float:
        """Bytes per second."""
        return self.nbytes / max(self.seconds, 1e-3)


def plan_relay(holders: Sequence[Holder], fetched: Mapping[str, Fetched]) -> dict[str, str]:
    """Return whom each server fetches from, by name; LEARNER for the learner.

    Args:
        holders: In the order in which they joined, which the plan keeps.
        fetched: What is known of each, by name.
    """
    large = {name: f for name, f in fetched.items() if f.nbytes >= BLOCK_BYTES}  # of less, the time says nothing
    rates = {name: f.rate for name, f in large.items()}
    usual = median(rates.values()) if rates else 0.0
    slow = {name for name, f in large.items() if f.rate < SLOW * rates.get(f.parent, usual)}
    relays = [h.name for h in holders if h.address]
    trunk = [name for name in relays if name not in slow] or relays
    leaves = [h.name for h in holders if h.name not in trunk]
    leaves.sort(key=lambda name: -rates[name] if name in slow else -math.inf)  # the slowest last
    most_bytes = max((f.nbytes for f in fetched.values()), default=0)
    children = _children_each(len(trunk), most_bytes)
    parents = {name: trunk[(i - 1) // children] if i else LEARNER for i, name in enumerate(trunk)}
    for i, name in enumerate(leaves):  # the last of the trunk has least to send
        parents[name] = trunk[-1 - i % len(trunk)] if trunk else LEARNER
    return parents


def route(name: str, parents: Mapping[str, str], holders: Mapping[str, Holder]) -> list[Holder]:
    """Return the servers that one is told to fetch from, best first; the learner comes after them."""
    ancestors: list[Holder] = []
    while (name := parents[name]) != LEARNER and len(ancestors) < ANCESTORS:
        ancestors.append(holders[name])
    return ancestors


def reachable(relay_address: str, sender_host: str) -> str:
    """Return where others reach a server that says `relay_address`; empty where they do not.

    `*` as the host is the one that its connection comes from. A server on the learner's own host that came over
    loopback is reached where the learner is: `*` then stays, and is the host that the other server dialed.
    """
    try:
        transport, host, port = parse_address(relay_address)
    except ConfigError:
        return ""
    if transport == "ipc" or host not in WILDCARD_HOSTS:
        return relay_address
    if not sender_host:
        return ""
    found = tcp_address(sender_host, port)
    return tcp_address("*", port) if is_local(found) else found


def _children_each(servers: int, nbytes: int) -> int:
    """How many others each server of the trunk feeds: 1, or 2 where that is sooner done. Unit: a block over a link."""
    blocks = nbytes / BLOCK_BYTES
    chain = blocks + servers - 1
    tree = 2 * (blocks + math.log2(servers + 1) - 1)
    return 2 if nbytes and tree < chain else 1
