"""Servers as the learner sees them: who is healthy, who is sent the next group, and what is left when one goes."""

from __future__ import annotations

import pytest

from learner.fleet import Fleet, Health, Server
from protocol.messages import Hello, ServerStatus
from protocol.versions import Lineage, Version

LIVENESS_S = 4.0


def make_hello(name: str, *, room: int = 8, live: Version | None = None) -> Hello:
    return Hello(
        session="s", server=name, engine="scripted", room=room, vocab_size=8, model_digest="", tokenizer_digest="",
        reward_functions=("scripted",), live=live,
    )  # fmt: skip


def make_fleet(*servers: str, room: int = 8, live: int | None = 0, now_s: float = 0.0) -> Fleet:
    fleet = Fleet(Lineage([(1, 0)]), liveness_s=LIVENESS_S)
    for name in servers:
        join(fleet, name, room=room, live=live, now_s=now_s)
    return fleet


def join(fleet: Fleet, name: str, *, room: int = 8, live: int | None = 0, now_s: float = 0.0) -> Server:
    version = None if live is None else Version(1, live)
    return fleet.join(name.encode(), make_hello(name, room=room, live=version), now_s)


def choose(fleet: Fleet, minimum: int = 0, samples: int = 4, now_s: float = 0.0, **options: bool) -> str | None:
    server = fleet.choose(min_policy_version=minimum, samples=samples, now_s=now_s, **options)
    return None if server is None else server.name


def test_health_follows_silence():
    fleet = make_fleet("north")
    server = fleet.servers[b"north"]
    assert fleet.health(server, 2.0) is Health.HEALTHY, "half of liveness_s exactly"
    assert fleet.health(server, 2.1) is Health.SUSPECT
    assert fleet.silent(4.0) == []
    assert fleet.silent(4.1) == [server]
    assert fleet.heard(b"north", 4.0) is server
    assert fleet.health(server, 4.1) is Health.HEALTHY
    assert fleet.heard(b"nobody", 4.0) is None


def test_a_joining_server_is_healthy_only_with_weights_of_this_lineage():
    fleet = Fleet(Lineage([(1, 0), (2, 5)]), liveness_s=LIVENESS_S)
    server = fleet.join(b"a", make_hello("a", live=Version(1, 6)), 0.0)
    assert server.live is None, "incarnation 1 was left at version 5: 1.6 is orphaned"
    assert fleet.health(server, 0.0) is Health.JOINING
    assert not fleet.went_live(b"a", Version(1, 7))
    assert fleet.health(server, 0.0) is Health.JOINING
    assert fleet.went_live(b"a", Version(2, 5))
    assert fleet.health(server, 0.0) is Health.HEALTHY
    assert fleet.join(b"b", make_hello("b", live=Version(1, 5)), 0.0).live == Version(1, 5)


def test_i5_a_live_version_never_goes_back():
    fleet = make_fleet("north", live=3)
    assert not fleet.went_live(b"north", Version(1, 2))
    assert fleet.servers[b"north"].live == Version(1, 3)
    assert fleet.went_live(b"north", Version(1, 3))
    assert fleet.went_live(b"north", Version(1, 9))


def test_a_draining_server_stays_draining():
    fleet = make_fleet("north")
    fleet.servers[b"north"].draining = True
    fleet.heard(b"north", 100.0)
    assert fleet.health(fleet.servers[b"north"], 100.0) is Health.DRAINING
    assert choose(fleet, now_s=100.0) is None


def test_the_server_with_most_room_is_chosen():
    fleet = make_fleet("small", room=8)
    join(fleet, "large", room=16)
    chosen = []
    for number in range(12):
        name = choose(fleet)
        chosen.append(name)
        assert name is not None
        fleet.assign(fleet.servers[name.encode()], f"g{number}", 4)
    assert chosen[:8] == ["large", "large", "small", "large", "small", "large", "small", "large"]
    assert chosen[8:] == ["small", "large", "large", "large"]
    assert choose(fleet) is None


def test_a_server_gets_as_much_again_as_it_has_room_for_and_no_more():
    """Until it has said how many of its samples are left, a group counts whole until it is answered."""
    fleet = make_fleet("north", room=8)
    for number in range(4):
        assert choose(fleet) == "north"
        fleet.assign(fleet.servers[b"north"], f"g{number}", 4)
    assert fleet.servers[b"north"].samples == 16
    assert choose(fleet) is None
    fleet.release("g0")
    assert choose(fleet) == "north"


def test_a_group_larger_than_the_room_is_still_placed():
    fleet = make_fleet("tiny", room=2)
    assert choose(fleet, samples=64) == "tiny"
    fleet.assign(fleet.servers[b"tiny"], "g0", 64)
    assert choose(fleet, samples=64) == "tiny", "one more to go on with"
    fleet.assign(fleet.servers[b"tiny"], "g1", 64)
    assert choose(fleet, samples=64) is None


def test_the_version_asked_for_decides_who_may():
    fleet = make_fleet()
    join(fleet, "old", live=2, room=64)
    join(fleet, "new", live=5)
    assert choose(fleet, minimum=2) == "old"
    assert choose(fleet, minimum=3) == "new"
    assert choose(fleet, minimum=6) is None
    assert choose(fleet, minimum=2, exact=True) == "old"
    assert choose(fleet, minimum=4, exact=True) is None


@pytest.mark.parametrize("silence_s", [2.1, 3.9])
def test_a_suspect_server_keeps_its_leases_and_gets_no_new_one(silence_s):
    fleet = make_fleet("north")
    fleet.assign(fleet.servers[b"north"], "g0", 4)
    assert choose(fleet, now_s=silence_s) is None
    assert fleet.holder("g0") is fleet.servers[b"north"]


def test_evaluation_has_room_of_its_own_whether_training_fills_the_rest_or_not():
    for num_training in (0, 8):
        fleet = make_fleet("north", room=16)
        server = fleet.servers[b"north"]
        for number in range(num_training):
            fleet.assign(server, f"t{number}", 4)
        assert choose(fleet) == (None if num_training else "north")
        placed = 0
        while choose(fleet, samples=1, reserve=True):
            fleet.assign(server, f"e{placed}", 1, evaluation=True)
            placed += 1
        assert placed == 4, "a quarter of the room"
        fleet.release("e0")
        assert choose(fleet, samples=1, reserve=True) == "north"
        fleet.answered(b"north", "e1")
        assert server.eval_outstanding == {"e2", "e3"}


def test_evaluation_is_placed_however_large_its_groups_are():
    fleet = make_fleet("tiny", room=2)
    assert choose(fleet, samples=16, reserve=True) == "tiny"
    fleet.assign(fleet.servers[b"tiny"], "e0", 16, evaluation=True)
    assert choose(fleet, samples=16, reserve=True) is None


def test_leaving_hands_back_what_was_held():
    fleet = make_fleet("north", "south")
    fleet.assign(fleet.servers[b"north"], "g0", 4)
    fleet.assign(fleet.servers[b"north"], "g1", 4)
    fleet.assign(fleet.servers[b"south"], "g2", 4)
    assert fleet.leave(b"north") == ["g0", "g1"]
    assert fleet.leave(b"north") == []
    assert (fleet.holder("g0"), fleet.release("g1")) == (None, None)
    assert fleet.named("north") is None
    assert fleet.named("south") is fleet.servers[b"south"]


def test_release_and_answered_let_go_once():
    fleet = make_fleet("north", "south")
    north = fleet.servers[b"north"]
    fleet.assign(north, "g0", 4)
    fleet.answered(b"south", "g0")
    assert fleet.holder("g0") is north, "another server's answer is not this one's"
    assert fleet.release("g0") is north
    assert fleet.release("g0") is None
    fleet.assign(north, "g1", 4)
    fleet.answered(b"north", "g1")
    fleet.answered(b"north", "g1")
    fleet.answered(b"gone", "g1")
    assert (fleet.holder("g1"), north.samples) == (None, 0)


def test_a_server_that_lost_its_weights_is_joining_again():
    fleet = Fleet(Lineage([(1, 0)]), liveness_s=4.0)
    server = fleet.join(b"north", make_hello("north", live=Version(1, 3)), 0.0)
    assert fleet.health(server, 0.0) is Health.HEALTHY
    fleet.lost_weights(b"north")
    assert fleet.health(server, 0.0) is Health.JOINING
    assert fleet.choose(min_policy_version=0, samples=1, now_s=0.0) is None
    assert fleet.went_live(b"north", Version(1, 2)), "an older version than the one that was lost is a version"


def test_samples_that_have_ended_hold_no_place_however_many_groups_wait_for_their_last_one():
    """16 groups of which each waits for a straggler fill 16 places, not 64."""
    fleet = make_fleet("north", room=16)
    server = fleet.servers[b"north"]
    for number in range(8):
        fleet.assign(server, f"g{number}", 4)
    assert choose(fleet) is None, "32 samples: as much again as it has room for"
    fleet.reported(server, ServerStatus(samples_running=8, samples_waiting=0, groups_in_flight=8))
    for number in range(8, 14):
        assert choose(fleet) == "north"
        fleet.assign(server, f"g{number}", 4)
    assert server.load == 32, "the 8 that were left, and 24 leased since"
    assert choose(fleet) is None
    fleet.answered(b"north", "g0")
    assert server.load == 32, "which of those it counts in has been answered is not known"


def test_leases_on_their_way_count_whatever_is_said_meanwhile():
    """Room 16, groups of 8: of four leases none has got there when the server says, again and again, that it idles."""
    fleet = make_fleet("north", room=16)
    server = fleet.servers[b"north"]
    for number in range(4):
        fleet.assign(server, f"g{number}", 8)
        fleet.reported(server, ServerStatus())
    assert (server.load, choose(fleet, samples=8)) == (32, None)
    fleet.reported(server, ServerStatus(samples_running=9, groups_in_flight=2))
    assert server.load == 25, "the other two are on their way"
    fleet.answered(b"north", "g1")
    fleet.reported(server, ServerStatus(samples_running=1, samples_waiting=8, groups_in_flight=2))
    assert server.load == 17, "g0 and g2 are there"


def test_a_status_from_before_the_answers_does_not_make_a_server_look_fuller_than_its_leases():
    fleet = make_fleet("north", room=16)
    server = fleet.servers[b"north"]
    fleet.assign(server, "g0", 4)
    fleet.reported(server, ServerStatus(samples_running=4, groups_in_flight=1))
    fleet.answered(b"north", "g0")
    assert server.load == 0


def test_the_server_with_fewest_samples_left_is_chosen_not_the_one_with_fewest_leases():
    fleet = make_fleet("north", "south", room=16)
    north, south = fleet.servers[b"north"], fleet.servers[b"south"]
    for number in range(4):
        fleet.assign(north, f"n{number}", 4)
    fleet.assign(south, "s0", 4)
    assert choose(fleet) == "south"
    fleet.reported(north, ServerStatus(samples_running=1, groups_in_flight=4))
    assert choose(fleet) == "north"
