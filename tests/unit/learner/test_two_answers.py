"""Two answers to one lease that arrive together: the journal holds the one that trains, for a replay takes the last."""

from __future__ import annotations

from tests.learners import answer, make_desk


def test_only_the_answer_that_trains_is_journaled():
    desk = make_desk()
    desk.join("north")
    desk.pump()
    (lease, *_) = desk.leases()

    desk.receive(answer(lease, seed=1))
    desk.receive(answer(lease, seed=2))
    desk.accept()

    (record,) = desk.journal.records
    (buffered,) = desk.buffer.take([0])
    assert record.group is buffered.group
    assert [status for _, status, _ in desk.acks()] == ["ok", "ok"]
