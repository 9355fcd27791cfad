"""Where servers are reached, and what each is told when a version is announced."""

from __future__ import annotations

import numpy as np
import pytest

from learner.loops import handle
from learner.relay_plan import reachable
from protocol.messages import Drain, WeightsLive, WeightsReady
from protocol.versions import Version
from tests.learners import Desk, make_desk


@pytest.mark.parametrize(
    ("said", "sender", "expected"),
    [
        ("tcp://*:5560", "10.0.0.7", "tcp://10.0.0.7:5560"),
        ("tcp://0.0.0.0:5560", "fe80::1", "tcp://[fe80::1]:5560"),
        ("tcp://10.9.9.9:5560", "10.0.0.7", "tcp://10.9.9.9:5560"),
        ("tcp://*:5560", "127.0.0.1", "tcp://*:5560"),  # the learner's own host: others dialed it
        ("tcp://*:5560", "", ""),
        ("ipc:///tmp/relay", "", "ipc:///tmp/relay"),
        ("", "10.0.0.7", ""),
        ("nonsense", "10.0.0.7", ""),
    ],
)
def test_a_relay_is_reached_where_its_connection_comes_from(said: str, sender: str, expected: str) -> None:
    assert reachable(said, sender) == expected


def announce(desk: Desk, policy_version: int) -> None:
    ready = WeightsReady(version=Version(1, policy_version), manifest=np.zeros(1, np.uint8), addresses=("tcp://*:1",))
    desk.coordinator.weights.announce(ready)


def told(desk: Desk, name: str) -> tuple[str, ...]:
    """The addresses of the last announcement to a server."""
    server = next(s for s in desk.coordinator.fleet.servers.values() if s.name == name)
    return desk.channel.to(server.peer, WeightsReady)[-1].addresses


def relay(number: int) -> str:
    return f"tcp://10.0.0.{number}:5560"


def test_every_server_is_told_of_those_before_it_and_the_learner_last() -> None:
    desk = make_desk(policy_version=3)
    for number, name in enumerate("abcde", 1):
        desk.join(name, live=2, relay_address=relay(number) if name != "c" else "")
    announce(desk, 3)
    assert told(desk, "a") == ("tcp://*:1",)
    assert told(desk, "b") == (relay(1), "tcp://*:1")
    assert told(desk, "d") == (relay(2), relay(1), "tcp://*:1")
    assert told(desk, "e") == (relay(4), relay(2), relay(1), "tcp://*:1")
    assert told(desk, "c") == (relay(5), relay(4), relay(2), "tcp://*:1")  # it passes nothing on


def test_who_joins_in_the_middle_comes_last_and_nobody_is_told_anew() -> None:
    desk = make_desk(policy_version=3)
    for number, name in enumerate("ab", 1):
        desk.join(name, live=2, relay_address=relay(number))
    announce(desk, 3)
    desk.join("c", live=None, relay_address=relay(3))
    assert told(desk, "c") == (relay(2), relay(1), "tcp://*:1")
    peers = [server.peer for server in desk.coordinator.fleet.servers.values()]
    assert [len(desk.channel.to(peer, WeightsReady)) for peer in peers] == [1, 1, 1]


def test_who_leaves_or_drains_feeds_nobody() -> None:
    desk = make_desk(policy_version=3)
    a, b, _ = (desk.join(name, live=2, relay_address=relay(number)) for number, name in enumerate("abc", 1))
    desk.coordinator.drop_server(a, "gone")
    handle(desk.coordinator, b, Drain(reason="done"))
    announce(desk, 3)
    assert told(desk, "c") == ("tcp://*:1",)
    assert told(desk, "b") == (relay(3), "tcp://*:1")


def test_who_was_slow_is_last_with_the_next_version() -> None:
    desk = make_desk(policy_version=3)
    servers = [desk.join(name, live=2, relay_address=relay(number)) for number, name in enumerate("abc", 1)]
    announce(desk, 3)
    for server, seconds in zip(servers, (1.0, 9.0, 9.5), strict=True):
        live = WeightsLive(version=Version(1, 3), bytes=1 << 30, transfer_s=seconds, verify_s=0.5)
        handle(desk.coordinator, server, live)
    announce(desk, 4)
    assert told(desk, "c") == (relay(1), "tcp://*:1")
    assert told(desk, "b") == (relay(3), relay(1), "tcp://*:1")
