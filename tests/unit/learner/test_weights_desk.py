"""What servers say of versions: turns, losses, checksums, and the worst of what they measured."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from learner.fleet import Health, Server
from learner.idle import NotLeased
from learner.loops import handle
from learner.rollover import MAX_TURN_S, TURN_S
from protocol.messages import (
    AnyMessage,
    Drain,
    Lease,
    Return,
    ServerStatus,
    WeightsFailed,
    WeightsLive,
    WeightsLost,
    WeightsReady,
    WeightsStaged,
    WeightsSwap,
)
from protocol.versions import Lineage, Version
from rollout_server.weights import SWAP_S as SERVER_SWAP_S
from tests.learners import Desk, make_desk, run


def announce(desk: Desk, policy_version: int, incarnation: int = 1) -> None:
    ready = WeightsReady(
        version=Version(incarnation, policy_version), manifest=np.zeros(1, np.uint8), addresses=("tcp://*:1",)
    )
    desk.coordinator.weights.announce(ready)


def trained_desk(policy_version: int = 3, **options: object) -> Desk:
    """A learner at that version, which is announced."""
    desk = make_desk(policy_version=policy_version, **options)
    announce(desk, policy_version)
    return desk


def say(desk: Desk, server: Server, message: AnyMessage) -> None:
    handle(desk.coordinator, server, message)


def stage(desk: Desk, server: Server, policy_version: int = 3) -> None:
    say(desk, server, WeightsStaged(version=Version(1, policy_version)))


def live(policy_version: int = 3, **fields: object) -> WeightsLive:
    return WeightsLive(version=Version(1, policy_version), **fields)


def turns(desk: Desk, server: Server) -> list[int]:
    """Versions that a server was told to swap to."""
    return [swap.version.policy_version for swap in desk.channel.to(server.peer, WeightsSwap)]


# --- turns


def test_a_lone_server_gets_its_turn_at_once():
    desk = trained_desk()
    server = desk.join(live=2)
    stage(desk, server)
    assert turns(desk, server) == [3]


def test_servers_swap_one_after_another():
    desk = trained_desk()
    north, south, east = (desk.join(name, live=2) for name in ("north", "south", "east"))
    for server in (north, south, east):
        stage(desk, server)
    assert [turns(desk, server) for server in (north, south, east)] == [[3], [], []]
    say(desk, north, live())
    assert [turns(desk, server) for server in (north, south, east)] == [[3], [3], []]
    say(desk, south, WeightsFailed(version=Version(1, 3), reason="its logprobs are off"))
    assert turns(desk, east) == [3]
    assert "south could not take version 1.3: its logprobs are off" in desk.coordinator.notices


def test_servers_that_serve_nothing_yet_need_not_wait_for_each_other():
    desk = trained_desk(0)
    servers = [desk.join(name, live=None) for name in ("north", "south", "east")]
    for server in servers:
        stage(desk, server, 0)
    assert [turns(desk, server) for server in servers] == [[0]] * 3


@pytest.mark.parametrize("how", ["lost", "gone", "silent", "failed to be told", "too late"])
def test_a_turn_that_comes_to_nothing_goes_to_the_next(how):
    desk = trained_desk()
    north, south = desk.join("north", live=1), desk.join("south", live=2)
    for server in (south, north):
        desk.coordinator.weights.rollover.staged(server.peer, Version(1, 3))
    if how == "failed to be told":
        desk.channel.gone.add(b"north")
    desk.coordinator.weights.give_turns()
    assert turns(desk, south) == ([3] if how == "failed to be told" else [])
    match how:
        case "lost":
            say(desk, north, WeightsLost(reason="it died"))
        case "gone":
            desk.coordinator.drop_server(north, "left")
        case "silent":
            desk.clock.now_s += desk.fleet.liveness_s + 1.0
            desk.fleet.heard(b"south", desk.clock())
        case "too late":
            desk.clock.now_s += TURN_S
            for peer in (b"north", b"south"):
                desk.fleet.heard(peer, desk.clock())
    if how in ("silent", "too late"):  # of the others it hears
        desk.coordinator.tick(())
    assert turns(desk, south) == [3]
    assert ("north has not swapped to version 1.3 for 30 s: the next one may" in desk.coordinator.notices) == (
        how == "too late"
    )


def test_only_the_version_that_was_announced_last_is_given_a_turn():
    desk = make_desk(policy_version=5, lineage=Lineage([(1, 0), (2, 4)]), incarnation=2)
    server = desk.join(live=Version(1, 2))
    say(desk, server, WeightsStaged(version=Version(2, 5)))
    assert turns(desk, server) == [], "trained, but not published yet"
    announce(desk, 5, incarnation=2)
    for version in (Version(1, 5), Version(2, 4), Version(2, 6), Version(3, 5)):
        say(desk, server, WeightsStaged(version=version))
        assert turns(desk, server) == [], version
    say(desk, server, WeightsStaged(version=Version(2, 5)))
    assert turns(desk, server) == [5]


def test_a_pinned_evaluation_keeps_newer_versions_from_everyone():
    """The publisher holds them back: what was never announced cannot be staged, and the pinned one still rolls."""
    desk = trained_desk(3)
    server = desk.join(live=2)
    desk.coordinator.ledger.policy_version = 5
    stage(desk, server, 5)
    assert turns(desk, server) == []
    stage(desk, server, 3)
    assert turns(desk, server) == [3]
    say(desk, server, live())
    announce(desk, 5)
    stage(desk, server, 5)
    assert turns(desk, server) == [3, 5]


def test_what_is_said_twice_gives_one_turn():
    desk = trained_desk()
    server = desk.join(live=2)
    stage(desk, server)
    say(desk, server, live())
    stage(desk, server)
    assert turns(desk, server) == [3], "it lives there already"
    assert desk.coordinator.weights.rollover.waiting == {}


def test_a_server_that_says_again_what_it_serves_keeps_its_turn():
    desk = trained_desk()
    north, south = desk.join("north", live=2), desk.join("south", live=2)
    stage(desk, north)
    stage(desk, south)
    say(desk, north, live(2))
    assert turns(desk, south) == []


def test_a_server_that_joins_anew_begins_at_the_end_of_the_line():
    desk = trained_desk()
    north, south = desk.join("north", live=2), desk.join("south", live=2)
    stage(desk, north)
    stage(desk, south)
    again = desk.join("north", live=2, peer=b"north-2", session="north-session-2")
    desk.coordinator.tick(())
    assert turns(desk, south) == [3], "the turn went with the connection"
    stage(desk, again)
    assert turns(desk, again) == []
    say(desk, south, live())
    assert turns(desk, again) == [3]


def test_a_draining_server_may_still_answer():
    desk = trained_desk()
    north, south = desk.join("north", live=2), desk.join("south", live=2)
    stage(desk, north)
    stage(desk, south)
    say(desk, north, Drain(reason="SIGTERM"))
    say(desk, north, live())
    assert turns(desk, south) == [3]


SWAP_S = 100.0
"""Of a server that is slow to swap, and shows life all the while."""


def roll(desk: Desk, servers: list[Server], policy_version: int, *, hung: Server | None = None) -> tuple[float, int]:
    """Announce a version and play its way over the fleet, a second at a time; seconds it took, and most that swapped.

    Every server shows life each second and answers its turn after SWAP_S; `hung` never does.
    """
    desk.coordinator.ledger.policy_version = policy_version
    announce(desk, policy_version)
    begun_s, most = desk.clock(), 0
    for server in servers:
        stage(desk, server, policy_version)
    since_s: dict[str, float] = {}
    while not all(server.live == Version(1, policy_version) for server in servers if server is not hung):
        desk.clock.now_s += 1.0
        for server in servers:
            desk.fleet.heard(server.peer, desk.clock())  # its heartbeat: swapping does not keep it from that
            if policy_version in turns(desk, server) and server.live != Version(1, policy_version):
                since_s.setdefault(server.name, desk.clock())
        most = max(most, len(since_s))
        for server in servers:
            if desk.clock() - since_s.get(server.name, desk.clock()) >= SWAP_S and server is not hung:
                del since_s[server.name]
                say(desk, server, live(policy_version))
        desk.coordinator.tick(())
    return desk.clock() - begun_s, most


def test_servers_that_are_slow_to_swap_are_waited_for_and_never_lost():
    """The first round learns how long a swap takes; from then on they swap one after another."""
    desk = trained_desk(2)
    servers = [desk.join(name, live=2) for name in ("north", "south", "east")]
    _, most = roll(desk, servers, 3)
    assert most > 1, "the first turns were too short"
    for version in (4, 5):
        took_s, most = roll(desk, servers, version)
        assert most == 1
        assert took_s == pytest.approx(3 * SWAP_S, abs=10.0)
    assert list(desk.fleet.servers.values()) == servers, "nobody was taken for dead"
    assert all(desk.fleet.health(server, desk.clock()) is Health.HEALTHY for server in servers)


def test_one_that_hangs_in_its_swap_does_not_hold_up_the_fleet_for_ever():
    desk = trained_desk(2)
    servers = [desk.join(name, live=2) for name in ("north", "south", "east")]
    roll(desk, servers, 3)
    took_s, _ = roll(desk, servers, 4, hung=servers[0])
    assert took_s == pytest.approx(3 * SWAP_S + 2 * SWAP_S, abs=10.0), "its turn, and two swaps"
    assert took_s < MAX_TURN_S + 3 * SWAP_S
    assert list(desk.fleet.servers.values()) == servers, "it shows life, and serves the old version"
    say(desk, servers[0], live(4))
    assert servers[0].live == Version(1, 4), "late is not too late"


def test_a_server_gives_a_load_up_later_than_the_fleet_does():
    assert MAX_TURN_S < SERVER_SWAP_S


# --- losses


def test_a_server_that_lost_its_weights_gets_no_lease_until_it_has_some():
    desk = trained_desk(0)
    server = desk.join(live=0)
    desk.pump()
    held = desk.leases()
    assert held
    say(desk, server, WeightsLost(reason="the engine has lost its weights and restarts"))
    assert desk.fleet.health(server, desk.clock()) is Health.JOINING
    assert "north: the engine has lost its weights and restarts" in desk.coordinator.notices
    say(desk, server, Return(group_id=held[0].group_id, attempt=1, reason="the engine died"))
    desk.pump()
    assert desk.leases() == []
    stage(desk, server, 0)
    assert turns(desk, server) == [0]
    say(desk, server, live(0))
    desk.pump()
    assert desk.leases()[0].ordinal == held[0].ordinal
    assert isinstance(desk.channel.sent[-1][1], Lease)


def test_a_server_that_lost_its_weights_while_it_waits_still_waits():
    desk = trained_desk()
    north, south = desk.join("north", live=2), desk.join("south", live=2)
    stage(desk, north)
    stage(desk, south)
    say(desk, south, WeightsLost(reason="it died"))
    assert turns(desk, south) == [3], "and pauses nobody any more"


# --- what they found


def test_checksums_of_the_first_go_to_those_after_it():
    desk = trained_desk()
    north, south, east = (desk.join(name, live=2) for name in ("north", "south", "east"))
    for server in (north, south, east):
        stage(desk, server)
    say(desk, north, live(checksum="tp2:aa"))
    say(desk, south, live(checksum="tp1:bb"))
    swaps = [desk.channel.to(server.peer, WeightsSwap)[0].checksums for server in (north, south, east)]
    assert swaps == [(), ("tp2:aa",), ("tp1:bb", "tp2:aa")]
    say(desk, east, live(checksum="tp2:cc"))
    assert "east holds other weights of version 1.3: tp2:cc, others tp2:aa" in desk.coordinator.notices
    desk.coordinator.ledger.policy_version = 4
    announce(desk, 4)
    stage(desk, north, 4)
    assert desk.channel.to(b"north", WeightsSwap)[-1].checksums == ()


def test_the_metrics_are_the_worst_of_the_newest_version():
    desk = trained_desk()
    north, south = desk.join("north", live=1), desk.join("south", live=1)
    assert desk.coordinator.weights.metrics() == {}
    say(desk, north, live(2, pause_s=9.0, check_s=9.0, mismatch_kl=0.9, mismatch=0.9))
    say(desk, north, live(3, pause_s=0.5, check_s=2.0))
    assert desk.coordinator.weights.metrics() == {"weights/pause_s": 0.5, "weights/check_s": 2.0}
    say(desk, south, live(2, pause_s=8.0, check_s=8.0, mismatch_kl=0.8, mismatch=0.8))
    say(desk, south, live(3, pause_s=0.25, check_s=3.0, mismatch_kl=0.001, mismatch=0.02))
    say(desk, south, live(3))
    assert desk.coordinator.weights.metrics() == {
        "weights/pause_s": 0.5, "weights/check_s": 3.0, "mismatch_kl": 0.001, "mismatch_logprob": 0.02
    }  # fmt: skip
    say(desk, north, live(3, mismatch_kl=0.002, mismatch=0.01))
    row = desk.coordinator.weights.metrics()
    assert (row["mismatch_kl"], row["mismatch_logprob"]) == (0.002, 0.02)


def test_what_a_server_says_of_versions_that_do_not_count_is_not_measured():
    desk = make_desk(policy_version=5, lineage=Lineage([(1, 0), (2, 4)]), incarnation=2)
    server = desk.join(live=None)
    say(desk, server, live(5, mismatch_kl=1.0, mismatch=1.0))
    assert server.live is None
    assert desk.coordinator.weights.metrics() == {}


def test_how_long_a_version_takes_to_a_server_counts_from_the_step_to_the_first():
    desk = trained_desk(policy_version=4)
    north, south = desk.join("north", live=1), desk.join("south", live=1)
    for made in (2, 3, 4):
        desk.coordinator.weights.made(made)
        desk.clock.now_s += 1.0
    say(desk, north, live(3))
    assert desk.coordinator.weights.metrics()["weights/live_s"] == 2.0
    desk.clock.now_s += 4.0
    say(desk, south, live(3))  # not the first
    assert desk.coordinator.weights.metrics()["weights/live_s"] == 2.0
    say(desk, south, live(4))
    assert desk.coordinator.weights.metrics()["weights/live_s"] == 5.0


# --- leases while servers swap


def ordinals(desk: Desk, server: Server) -> list[int]:
    return [lease.ordinal for lease in desk.leases(server.name)]


def two_servers(**south: object) -> tuple[Desk, Server, Server]:
    """North serves what all groups need and has seats for one of them; south, with as many, serves weights too old."""
    desk = trained_desk()
    return desk, desk.join("north", live=3, room=4), desk.join("south", **{"live": 0, "room": 4, **south})


@pytest.mark.parametrize("before", [0, None])
def test_nothing_is_queued_while_a_server_with_free_seats_is_about_to_swap(before):
    desk, north, south = two_servers(live=before)
    stage(desk, south)
    desk.pump()
    assert (ordinals(desk, north), ordinals(desk, south)) == ([0], [])
    say(desk, south, live())
    desk.pump()
    assert (ordinals(desk, north), ordinals(desk, south)) == ([2], [1, 3]), "each its seats, and as much again to wait"


def test_nothing_is_queued_while_it_waits_for_its_turn():
    desk, north, south = two_servers()
    east = desk.join("east", live=0, room=4)
    east.status, east.samples = ServerStatus(samples_running=4), 4
    stage(desk, east)
    stage(desk, south)
    assert turns(desk, south) == [], "east's comes first, which will bring no seats"
    desk.pump()
    assert (ordinals(desk, north), ordinals(desk, south)) == ([0], [])


def test_a_server_that_has_nothing_staged_or_no_free_seats_or_is_silent_keeps_nobody_from_queueing():
    desk, north, south = two_servers()
    desk.pump()
    assert ordinals(desk, north) == [0, 1], "who knows when it will have fetched them"

    desk, north, south = two_servers()
    south.status = ServerStatus(samples_running=4)
    south.samples = 4
    stage(desk, south)
    desk.pump()
    assert ordinals(desk, north) == [0, 1], "it would be queued there"

    desk, north, south = two_servers()
    stage(desk, south)
    desk.clock.now_s += 0.75 * desk.fleet.liveness_s
    desk.fleet.heard(north.peer, desk.clock())
    assert desk.fleet.health(south, desk.clock()) is Health.SUSPECT
    desk.pump()
    assert ordinals(desk, north) == [0, 1]


@pytest.mark.parametrize(
    "message", [WeightsFailed(version=Version(1, 3), reason="no memory"), WeightsLost(reason="died"), Drain(reason="")]
)
def test_a_server_that_will_not_swap_after_all_is_waited_for_no_longer(message):
    desk, north, south = two_servers()
    stage(desk, south)
    desk.pump()
    assert ordinals(desk, north) == [0]

    async def told() -> None:
        waiting = asyncio.create_task(desk.coordinator.changed.wait())
        await asyncio.sleep(0)
        say(desk, south, message)
        await asyncio.wait_for(waiting, 1.0)

    run(told())
    desk.pump()
    assert ordinals(desk, north) == [1]


def test_a_version_that_is_too_old_for_the_groups_brings_no_seats():
    desk, north, south = two_servers()
    desk.coordinator.weights.rollover.begin(Version(1, 0))
    south.live = None
    stage(desk, south, 0)
    desk.pump()
    assert ordinals(desk, north) == [0, 1]


def test_a_turn_that_is_over_keeps_nobody_from_queueing():
    desk, north, south = two_servers()
    stage(desk, south)
    desk.pump()
    desk.clock.now_s += TURN_S
    for server in (north, south):
        desk.fleet.heard(server.peer, desk.clock())
    desk.coordinator.weights.tick()
    desk.pump()
    assert ordinals(desk, north) == [0, 1]


def test_seats_that_are_empty_until_a_server_has_swapped_wait_for_weights():
    desk, _, south = two_servers()
    stage(desk, south)
    desk.pump()
    desk.coordinator.idle.observe()
    desk.clock.now_s += 2.0
    assert desk.coordinator.idle.take().leasing == {NotLeased.WEIGHTS: 2.0}
