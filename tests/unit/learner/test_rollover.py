"""Rollover: how many swap at once, who is first in line, and what ends a turn."""

from __future__ import annotations

import pytest

from learner.rollover import MAX_TURN_S, SWAPS_REMEMBERED, TURN_S, Rollover
from protocol.versions import Version

V1, V2, V3 = Version(1, 1), Version(1, 2), Version(1, 3)
NORTH, SOUTH, EAST = b"north", b"south", b"east"


def rolling(version: Version = V2) -> Rollover:
    rollover = Rollover()
    rollover.begin(version)
    return rollover


def fleet(size: int, live: Version | None = V1) -> dict[bytes, Version | None]:
    return {f"s{index:02}".encode(): live for index in range(size)}


@pytest.mark.parametrize(("servers", "at_once"), [(1, 1), (3, 1), (15, 1), (16, 2), (31, 3), (64, 8)])
def test_an_eighth_of_the_fleet_swaps_at_once_and_one_at_least(servers: int, at_once: int) -> None:
    rollover, live = rolling(), fleet(servers)
    for server in live:
        assert rollover.staged(server, V2)
    assert rollover.grant(live, len(live), 0.0) == list(live)[:at_once]
    assert rollover.grant(live, len(live), 0.0) == []
    for index, server in enumerate(list(live)[: servers - at_once]):
        rollover.swapped(server, V2, 0.0)
        live[server] = V2
        assert rollover.grant(live, len(live), 0.0) == [list(live)[index + at_once]]


def test_whoever_serves_the_oldest_weights_goes_first() -> None:
    rollover = rolling(V3)
    for server in (NORTH, SOUTH, EAST):
        rollover.staged(server, V3)
    live = {NORTH: V2, SOUTH: V1, EAST: V2}
    order = []
    while granted := rollover.grant(live, len(live), 0.0):
        order += granted
        rollover.swapped(granted[0], V3, 0.0)
    assert order == [SOUTH, NORTH, EAST], "and of equals whoever waits longest"


def test_a_server_that_fails_at_the_version_lets_the_others_go_before_it_tries_again() -> None:
    rollover = rolling(V3)
    live = {NORTH: V1, SOUTH: V2, EAST: V2}
    for server in live:
        rollover.staged(server, V3)
    order = []
    while len(order) < 4:
        (server,) = rollover.grant(live, len(live), 0.0)
        order.append(server)
        rollover.swapped(server, V3, 0.0)
        if server == NORTH:
            rollover.staged(NORTH, V3)
    assert order == [NORTH, SOUTH, EAST, NORTH]
    rollover.begin(Version(1, 4))
    for server in live:
        rollover.staged(server, Version(1, 4))
    assert rollover.grant(live, len(live), 0.0) == [SOUTH], "with the next version, too, although it is the oldest"


def test_a_server_without_weights_pauses_nobody_and_waits_for_nobody() -> None:
    rollover = rolling()
    rollover.staged(NORTH, V2)
    live = {NORTH: V1, SOUTH: None, EAST: None}
    assert rollover.grant(live, len(live), 0.0) == [NORTH]
    for server in (SOUTH, EAST):
        rollover.staged(server, V2)
    assert rollover.grant(live, len(live), 0.0) == [SOUTH, EAST]
    rollover.swapped(NORTH, V2, 0.0)
    rollover.staged(b"west", V2)
    assert rollover.grant({**live, b"west": V1}, len(live) + 1, 0.0) == [b"west"], "their turns are not counted"


def test_only_the_version_that_rolls_may_be_staged() -> None:
    rollover = Rollover()
    assert not rollover.staged(NORTH, V1)
    assert rollover.grant({NORTH: None}, 1, 0.0) == []
    rollover.begin(V2)
    for version in (V1, V3, Version(2, 2)):
        assert not rollover.staged(NORTH, version)
    assert rollover.grant({NORTH: V1}, 1, 0.0) == []


def test_a_newer_version_sends_the_line_home_and_leaves_the_turns() -> None:
    rollover = rolling(V2)
    rollover.staged(NORTH, V2)
    rollover.staged(SOUTH, V2)
    live = {NORTH: V1, SOUTH: V1}
    assert rollover.grant(live, len(live), 0.0) == [NORTH]
    rollover.begin(V3)
    rollover.begin(V3)
    assert rollover.grant(live, len(live), 0.0) == []
    rollover.staged(SOUTH, V3)
    assert rollover.grant(live, len(live), 0.0) == [], "north still swaps"
    rollover.begin(V3)
    rollover.swapped(NORTH, V2, 0.0)
    assert rollover.grant(live, len(live), 0.0) == [SOUTH], "announcing the same again changes nothing"


@pytest.mark.parametrize("how", ["live", "a newer one live", "lost", "staged again", "left", "too late"])
def test_what_ends_a_turn(how: str) -> None:
    rollover = rolling()
    live = {NORTH: V1, SOUTH: V1}
    rollover.staged(NORTH, V2)
    rollover.staged(SOUTH, V2)
    assert rollover.grant(live, len(live), 100.0) == [NORTH]
    match how:
        case "live":
            rollover.swapped(NORTH, V2, 0.0)
        case "a newer one live":
            rollover.swapped(NORTH, V3, 0.0)
        case "lost":
            rollover.failed(NORTH)
        case "staged again":
            rollover.staged(NORTH, V2)
        case "left":
            rollover.left(NORTH)
        case "too late":
            assert rollover.expire(100.0 + TURN_S - 0.1) == []
            assert rollover.grant(live, len(live), 100.0) == []
            assert rollover.expire(100.0 + TURN_S) == [NORTH]
    granted = rollover.grant(live, len(live), 100.0)
    assert granted == [SOUTH]


def test_what_does_not_end_a_turn() -> None:
    rollover = rolling()
    rollover.staged(NORTH, V2)
    rollover.staged(SOUTH, V2)
    live = {NORTH: V1, SOUTH: V1}
    rollover.grant(live, len(live), 0.0)
    rollover.swapped(NORTH, V1, 0.0)  # it says again what it serves meanwhile
    rollover.swapped(SOUTH, V2, 0.0)
    rollover.left(EAST)
    assert rollover.grant(live, len(live), 0.0) == []


def test_who_left_is_not_in_the_line() -> None:
    rollover = rolling()
    rollover.staged(NORTH, V2)
    rollover.staged(SOUTH, V2)
    rollover.left(NORTH)
    assert rollover.grant({SOUTH: V1}, 2, 0.0) == [SOUTH]


def swap_in(rollover: Rollover, server: bytes, version: Version, swap_s: float, live: Version | None = V1) -> None:
    """A server of its own stages a version, gets its turn, and is live after so many seconds."""
    rollover.begin(version)
    rollover.staged(server, version)
    assert rollover.grant({server: live}, 2, 0.0) == [server]
    rollover.expire(swap_s)
    rollover.swapped(server, version, swap_s)


@pytest.mark.parametrize(
    ("swap_s", "turn_s"), [(0.1, TURN_S), (10.0, TURN_S), (20.0, 60.0), (100.0, 300.0), (5000.0, MAX_TURN_S)]
)
def test_a_turn_is_as_long_as_swaps_are(swap_s: float, turn_s: float) -> None:
    rollover = Rollover()
    assert rollover.turn_s == TURN_S
    swap_in(rollover, NORTH, V2, swap_s)
    assert rollover.turn_s == turn_s
    for number in range(SWAPS_REMEMBERED):
        swap_in(rollover, NORTH, Version(1, 10 + number), 1.0)
    assert rollover.turn_s == TURN_S, "what was once is forgotten"


def test_one_that_hung_once_does_not_make_turns_longer() -> None:
    rollover = Rollover()
    for number, swap_s in enumerate((1.0, 2.0, 500.0, 1.0, 400.0)):
        swap_in(rollover, NORTH, Version(1, number), swap_s)
    assert rollover.turn_s == TURN_S


@pytest.mark.parametrize("how", ["failed", "lost", "left", "staged again", "served nothing", "was older"])
def test_what_says_nothing_of_how_long_a_swap_takes(how: str) -> None:
    rollover = rolling()
    rollover.staged(NORTH, V2)
    rollover.grant({NORTH: None if how == "served nothing" else V1}, 2, 0.0)
    match how:
        case "failed":
            rollover.failed(NORTH, V2)
        case "lost":
            rollover.failed(NORTH)
        case "left":
            rollover.left(NORTH)
        case "staged again":
            rollover.staged(NORTH, V2)
    rollover.swapped(NORTH, V1 if how == "was older" else V2, 500.0)
    assert rollover.turn_s == TURN_S


def test_the_first_checksum_of_a_kind_is_what_others_are_compared_with() -> None:
    rollover = rolling()
    assert rollover.checksums == ()
    assert rollover.reported(V2, "tp2:aa") is None
    assert rollover.reported(V2, "tp2:aa") is None
    assert rollover.reported(V2, "tp1:bb:cc") is None
    assert rollover.reported(V2, "tp2:dd") == "tp2:aa"
    assert rollover.checksums == ("tp1:bb:cc", "tp2:aa")
    for other in ("", "nothing to compare"):
        assert rollover.reported(V2, other) is None
    assert rollover.reported(V1, "tp4:ee") is None, "of an older version"
    assert rollover.checksums == ("tp1:bb:cc", "tp2:aa")
    rollover.begin(V3)
    assert rollover.checksums == ()


def test_who_will_serve_a_version_soon() -> None:
    """At first nobody knows how long a swap takes: all of the line may be soon. Turns count, not who came first."""
    rollover = rolling()
    servers = [str(number).encode() for number in range(20)]
    live: dict[bytes, Version | None] = dict.fromkeys(servers, V1)

    def soon(now_s: float, policy_version: int = 2) -> list[bytes]:
        return list(rollover.soon(policy_version, live, 20, now_s))

    for server in reversed(servers):
        rollover.staged(server, V2)
    live |= {servers[18]: Version(1, 0), servers[3]: Version(1, 0)}
    assert rollover.grant(live, 20, 0.0) == [servers[18], servers[3]], "who serves the oldest weights"
    assert set(soon(0.0)) == set(servers)
    assert soon(0.0, policy_version=3) == [], "it is too old"
    rollover.swapped(servers[18], V2, 0.4)
    live[servers[0]] = Version(1, 0)
    assert soon(0.4) == [servers[3], servers[0], servers[19], servers[17], servers[16]], "the last that came is first"
    live[servers[0]] = None
    assert servers[0] in soon(0.4), "it pauses nobody, and need not wait for a turn"


def test_nobody_is_soon_behind_one_that_hangs() -> None:
    rollover = rolling()
    live: dict[bytes, Version | None] = {NORTH: V1, SOUTH: V1}
    rollover.staged(NORTH, V2)
    rollover.grant(live, 2, 0.0)
    rollover.swapped(NORTH, V2, 0.4)
    rollover.begin(V3)
    for server in (NORTH, SOUTH):
        rollover.staged(server, V3)
    assert rollover.grant(live, 2, 1.0) == [SOUTH]
    assert list(rollover.soon(3, live, 2, 1.2)) == [SOUTH, NORTH], "0.2 s left, and then 0.4"
    assert list(rollover.soon(3, live, 2, 2.5)) == [], "it has been at it for four times as long as usual"
    rollover.expire(1.0 + TURN_S)
    assert list(rollover.soon(3, live, 2, 1.0 + TURN_S)) == [NORTH], "the turn is free"


def test_slow_swaps_are_not_soon_before_they_end() -> None:
    rollover = rolling()
    live: dict[bytes, Version | None] = {NORTH: V1, SOUTH: V1}
    rollover.staged(NORTH, V2)
    rollover.staged(SOUTH, V2)
    rollover.grant(live, 2, 0.0)
    rollover.swapped(NORTH, V2, 5.0)
    assert list(rollover.soon(2, live, 2, 5.0)) == []
    assert rollover.grant(live, 2, 5.0) == [SOUTH]
    assert list(rollover.soon(2, live, 2, 6.0)) == [], "its swap has only begun"
    assert list(rollover.soon(2, live, 2, 9.5)) == [SOUTH]
