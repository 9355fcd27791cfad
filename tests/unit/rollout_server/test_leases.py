"""LeaseBook: what a server owes the learner."""

from __future__ import annotations

from rollout_server.leases import LeaseBook
from tests.factories import make_group, make_lease


def test_a_new_lease_is_work_and_the_same_one_again_is_not() -> None:
    book, lease = LeaseBook(), make_lease()
    assert book.accept(lease)
    assert book.wants(lease)
    assert not book.accept(lease)
    assert list(book.in_flight) == [lease.group_id]


def test_a_newer_attempt_renames_what_is_under_way() -> None:
    book, first = LeaseBook(), make_lease(attempt=1)
    book.accept(first)
    assert not book.accept(make_lease(attempt=2))
    assert book.wants(first), "the work goes on"
    finished = book.finish(first, make_group(attempt=1))
    assert finished is not None
    assert finished.attempt == 2


def test_a_newer_attempt_renames_what_is_finished() -> None:
    book, lease = LeaseBook(), make_lease(attempt=1)
    book.accept(lease)
    book.finish(lease, make_group(attempt=1))
    assert not book.accept(make_lease(attempt=2))
    assert [group.attempt for group in book.unacked.values()] == [2]
    assert not book.in_flight


def test_a_finished_group_is_held_until_its_ack() -> None:
    book, lease = LeaseBook(), make_lease()
    book.accept(lease)
    group = make_group()
    finished = book.finish(lease, group)
    assert finished is not None
    assert list(book.unacked) == [group.group_id]
    assert not book.in_flight
    assert book.finished == 1
    book.acknowledged(group.group_id)
    assert not book.unacked


def test_an_ack_of_an_earlier_answer_leaves_the_newer_lease_alone() -> None:
    book, lease = LeaseBook(), make_lease(attempt=2)
    book.accept(lease)
    book.acknowledged(lease.group_id)
    assert book.wants(lease)


def test_work_that_was_dropped_finishes_for_nobody() -> None:
    book, lease = LeaseBook(), make_lease()
    book.accept(lease)
    assert book.drop(lease.group_id) is lease
    assert book.drop(lease.group_id) is None
    assert not book.wants(lease)
    assert book.finish(lease, make_group()) is None
    assert (book.finished, book.unacked) == (0, {})


def test_work_of_a_dropped_lease_does_not_answer_the_next_one_of_its_group() -> None:
    book, first, second = LeaseBook(), make_lease(attempt=1), make_lease(attempt=2)
    book.accept(first)
    book.drop(first.group_id)
    assert book.accept(second), "the group is unknown again: it is new work"
    assert book.finish(first, make_group()) is None
    assert book.wants(second)
    assert book.finish(second, make_group()) is not None


def test_drop_forgets_finished_groups_too_and_says_that_nothing_was_in_flight() -> None:
    book, lease = LeaseBook(), make_lease()
    book.accept(lease)
    book.finish(lease, make_group())
    assert book.drop(lease.group_id) is None
    assert not book.unacked


def test_after_a_welcome_only_what_is_wanted_is_kept() -> None:
    book = LeaseBook()
    leases = [make_lease(ordinal=ordinal) for ordinal in range(4)]
    for lease in leases:
        book.accept(lease)
    for ordinal in (0, 1):
        book.finish(leases[ordinal], make_group(ordinal=ordinal))
    unwanted = book.keep([leases[0].group_id, leases[2].group_id, "0" * 32])
    assert unwanted == [leases[3].group_id], "only what is in flight can be aborted"
    assert list(book.unacked) == [leases[0].group_id]
    assert list(book.in_flight) == [leases[2].group_id]
    assert not book.wants(leases[3])


def test_after_a_welcome_that_keeps_nothing_the_book_is_empty() -> None:
    book, lease = LeaseBook(), make_lease()
    book.accept(lease)
    assert book.keep([]) == [lease.group_id]
    assert (book.in_flight, book.unacked) == ({}, {})
