"""How fast the links are taken for, before and after they have been seen."""

from __future__ import annotations

import pytest

from learner.links import LOOPBACK, SHARED, Links
from protocol.messages import WeightsLive, WeightsPath
from protocol.versions import Version
from protocol.weights.push_costs import NETWORK, TELLING_BYTES


def report(path: WeightsPath, *, num_bytes: int = 0, s: float = 0.0) -> WeightsLive:
    return WeightsLive(version=Version(1, 1), path=path, bytes=num_bytes, transfer_s=s)


def test_without_servers_nobody_waits_for_bytes() -> None:
    assert Links(local=False).slowest == SHARED


@pytest.mark.parametrize(("local", "unseen"), [(True, LOOPBACK), (False, NETWORK)])
def test_a_link_is_taken_for_what_such_links_are_until_it_is_seen(local: bool, unseen: object) -> None:
    links = Links(local=local)
    links.joined("a")
    assert links.slowest == unseen


def test_the_slowest_link_is_what_counts_and_goes_with_its_server() -> None:
    links = Links(local=False)
    for name, s in (("fast", 0.01), ("slow", 10.0)):
        links.joined(name)
        for _ in range(30):
            links.live(name, report(WeightsPath.DENSE, num_bytes=10_000_000, s=s))
    assert links.slowest.bytes_per_s == pytest.approx(1e6, rel=0.05)
    links.left("slow")
    assert links.slowest.bytes_per_s == pytest.approx(1e9, rel=0.05)


def test_shared_memory_is_no_link_until_it_can_no_longer_be_read() -> None:
    links = Links(local=True)
    links.joined("a")
    links.live("a", report(WeightsPath.SHARED))
    assert links.slowest == SHARED
    links.live("a", report(WeightsPath.DENSE, num_bytes=15_000_000, s=0.01))
    assert links.slowest == LOOPBACK.after_transfer(15_000_000, 0.01)


@pytest.mark.parametrize(
    "said", [report(WeightsPath.NONE), report(WeightsPath.DELTA, num_bytes=TELLING_BYTES - 1, s=9.0)]
)
def test_what_tells_nothing_changes_nothing(said: WeightsLive) -> None:
    links = Links(local=True)
    links.joined("a")
    links.live("a", said)
    assert links.slowest == LOOPBACK
