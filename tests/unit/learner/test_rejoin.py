"""A server that says Hello again: what its lost connection must not cost."""

from __future__ import annotations

from learner.ledger import End
from tests.learners import answer, make_desk


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
