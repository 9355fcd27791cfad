"""A server that says Hello again: what its lost connection must not cost."""

from __future__ import annotations

from learner.ledger import End
from protocol.messages import Refused, Welcome
from protocol.versions import Version
from tests.factories import RUN_ID
from tests.learners import answer, make_desk, make_hello


def test_a_lost_report_of_live_weights_does_not_keep_their_slots():
    """Synchronous: every slot waits for version 1, whose WeightsLive was lost with the connection."""
    desk = make_desk(max_staleness=0)
    desk.join("north")
    desk.pump()
    for lease in desk.leases():
        desk.receive(answer(lease))
    desk.accept()
    desk.ledger.batch([0, 1])
    desk.ledger.trained([0, 1], 1)
    desk.pump()
    assert desk.leases() == [], "no slot is free"

    desk.join("north", peer=b"again", live=1)
    desk.pump()

    assert [lease.ordinal for lease in desk.leases("again")] == [2, 3]


def test_a_new_process_under_the_same_name_has_lost_its_groups_and_that_counts():
    """Else a prompt that kills its server would be leased for ever."""
    desk = make_desk(max_attempts=1)
    desk.join("north", peer=b"first")
    desk.pump()
    held = len(desk.leases("first"))

    desk.join("north", peer=b"second", live=None, run_id="", incarnation=0)

    assert desk.ledger.ends[End.QUARANTINED] == held > 0


def test_an_adopted_group_is_not_taken_for_younger_than_it_may_be():
    """Its samples may have begun before the server's version: a short step must not outrun them."""
    desk = make_desk(policy_version=4)
    server = desk.join("north", live=2)
    desk.pump()
    (first, *_) = desk.leases()
    assert desk.ledger.entries[0].floor == 2

    server.live = None
    desk.join("north", peer=b"again", live=4, in_flight=(first.group_id,))

    assert desk.ledger.entries[0].floor == first.min_version.policy_version == 2


def test_what_a_server_goes_on_with_after_it_came_back_is_shown():
    desk = make_desk()
    desk.join("north", peer=b"first", session="3f2a-1")
    desk.pump()
    (lease, *_) = desk.leases("first")
    desk.clock.now_s += 2.0
    desk.join("north", peer=b"second", session="3f2a-2", in_flight=(lease.group_id,))
    back_s = desk.clock()
    desk.clock.now_s += 3.0
    desk.receive(answer(lease), "second")
    *_, lost, finished = [span for span in desk.coordinator.spans.take() if span.name == f"group {lease.ordinal}"]
    assert (lost.note, lost.ended_s) == ("lost: it joined anew", back_s)
    assert (finished.process, finished.lane) == ("north", "groups")
    assert (finished.begun_s, finished.ended_s) == (back_s, back_s + 3.0)


def test_a_hello_read_after_a_later_one_of_the_same_process_changes_nothing():
    """ZeroMQ keeps no order between connections: one given up while the learner was busy may be read last."""
    desk = make_desk()
    desk.join("north", peer=b"second", session="3f2a-2")
    desk.pump()
    held = desk.leases("second")

    desk.coordinator.hello(b"first", make_hello("north", session="3f2a-1"))

    assert list(desk.fleet.servers) == [b"second"]
    assert desk.channel.to(b"second", Refused) == [], "it would end for nothing"
    assert desk.channel.to(b"first", Welcome) == []
    assert desk.fleet.servers[b"second"].outstanding.keys() == {lease.group_id for lease in held}


def test_a_connection_given_up_before_its_welcome_costs_no_attempt():
    """A learner that is long in reading its journal finds several of them; each adopts what the server has."""
    desk = make_desk(max_attempts=1)
    desk.join("north", peer=b"first", session="3f2a-1")
    desk.pump()
    in_flight = tuple(lease.group_id for lease in desk.leases("first"))
    desk.channel.gone.add(b"second")

    hello = make_hello("north", session="3f2a-2", in_flight=in_flight, live=Version(1, 0), run_id=RUN_ID, incarnation=1)
    desk.coordinator.hello(b"second", hello)

    assert desk.fleet.servers == {}
    assert desk.ledger.ends[End.QUARANTINED] == 0
    assert {entry.faults for entry in desk.ledger.entries.values()} == {0}

    desk.join("north", peer=b"third", session="3f2a-3", in_flight=in_flight)
    assert desk.fleet.servers[b"third"].outstanding.keys() == set(in_flight)
