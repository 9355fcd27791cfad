"""A group's way from the connection to the buffer: validated, journaled, acknowledged, offered. In that order."""

from __future__ import annotations

import asyncio

import msgspec
import numpy as np
import pytest

from learner.arrivals import MOST_AT_ONCE
from learner.evaluation import Evaluation
from learner.journal_records import EndRecord, GroupRecord
from learner.ledger import End, State
from learner.tuning.virtual_time import run_virtual
from protocol.messages import Ack, Cancel, Lease, Purpose
from protocol.parts import split_group
from protocol.versions import Lineage, Version
from tests.factories import make_train_group
from tests.learners import Desk, answer, make_desk, make_hello


def begin(**options) -> tuple[Desk, list[Lease]]:
    """A desk whose one server has been leased all six groups."""
    desk = make_desk(**options)
    desk.join("north", room=1000)
    desk.pump()
    return desk, desk.leases()


def state_of(desk: Desk, ordinal: int) -> State | None:
    entry = desk.ledger.find(ordinal)
    return None if entry is None else entry.state


def test_a_good_group_is_journaled_acknowledged_and_buffered():
    desk, leases = begin()
    group = answer(leases[2])
    desk.receive(group)
    assert desk.fleet.holder(group.group_id) is None, "its sender owes nothing any more: it may say Goodbye"
    assert state_of(desk, 2) is State.LEASED
    desk.accept()
    (record,) = desk.journal.records
    assert isinstance(record, GroupRecord)
    assert (record.incarnation, record.prompt, record.prompt_tokens.tolist()) == (1, "2 =", [4, 3])
    assert record.group is group
    assert desk.acks() == [(1, "ok", "")]
    assert state_of(desk, 2) is State.BUFFERED
    (buffered,) = desk.buffer.take([2])
    assert (buffered.ordinal, buffered.sequence, buffered.group is group) == (2, 2, True)


def test_i7_the_ack_leaves_only_when_the_journal_has_the_group():
    async def scenario():
        desk, leases = begin()
        desk.journal.gate.clear()
        desk.receive(answer(leases[0]))
        accepting = asyncio.create_task(desk.arrivals.accept_next())
        await asyncio.sleep(1)
        assert (desk.acks(), len(desk.buffer), state_of(desk, 0)) == ([], 0, State.LEASED)
        desk.journal.gate.set()
        await accepting
        assert (desk.acks(), len(desk.buffer), state_of(desk, 0)) == ([(1, "ok", "")], 1, State.BUFFERED)

    run_virtual(scenario())


def test_i7_a_disk_that_refuses_acknowledges_nothing():
    desk, leases = begin()
    desk.journal.error = OSError(28, "No space left on device")
    desk.receive(answer(leases[0]))
    with pytest.raises(OSError, match="No space left"):
        desk.accept()
    assert (desk.acks(), len(desk.buffer)) == ([], 0)


def test_groups_that_wait_share_one_append():
    desk, leases = begin(prompts_per_step=40, max_staleness=1)
    for lease in leases:
        desk.receive(answer(lease))
    assert len(leases) == 80
    desk.accept()
    assert [len(records) for records in desk.journal.appends] == [MOST_AT_ONCE, 80 - MOST_AT_ONCE]
    assert len(desk.buffer) == 80


def test_ends_are_journaled_with_the_next_groups():
    desk, leases = begin(too_long=(0,), prompts_per_step=1, max_staleness=3, max_attempts=1)
    desk.coordinator.lost(leases[0].group_id, fault=True, reason="engine failed")
    desk.receive(answer(leases[1]))
    desk.accept()
    group, *ends = desk.journal.records
    assert isinstance(group, GroupRecord)
    assert all(isinstance(record, EndRecord) for record in ends)
    assert desk.journal.ends() == [(0, "filtered"), (1, "quarantined")]


# Filtered


def test_a_group_without_differences_is_journaled_and_filtered_and_its_slot_is_free():
    desk, leases = begin()
    slots = desk.ledger.slots_in_use
    desk.receive(answer(leases[0], rewards=(1.0, 1.0, 1.0, 1.0)))
    desk.accept()
    assert desk.journal.ordinals() == [0]
    assert desk.acks() == [(1, "ok", "")]
    assert (desk.ledger.ends[End.FILTERED], desk.ledger.slots_in_use, len(desk.buffer)) == (1, slots - 1, 0)
    assert [group.ordinal for group in desk.stats.filtered] == [0], "its rewards still count in `reward`"
    (end,) = desk.coordinator.take_unjournaled()
    assert (end.ordinal, end.end, end.reason) == (0, "filtered", "all rewards are 1")
    assert 0 not in desk.coordinator.rows


def test_groups_without_differences_may_be_kept():
    desk, leases = begin(filter_zero_std=False)
    desk.receive(answer(leases[0], rewards=(1.0, 1.0, 1.0, 1.0)))
    desk.receive(answer(leases[1], rewards=(1.0, None, None, None)))
    desk.accept()
    assert (len(desk.buffer), desk.ledger.ends[End.FILTERED]) == (1, 1), "one scored completion is never enough"


# Twice, late, from nowhere


def test_the_same_group_twice_is_buffered_once():
    desk, leases = begin()
    group = answer(leases[0])
    desk.receive(group)
    desk.receive(group)
    desk.accept()
    assert (len(desk.buffer), desk.journal.ordinals()) == (1, [0])
    assert desk.acks() == [(1, "ok", ""), (1, "ok", "")]
    desk.receive(group)
    desk.accept()
    assert (len(desk.buffer), desk.journal.ordinals()) == (1, [0])
    assert desk.acks()[2:] == [(1, "duplicate", "")]
    assert desk.coordinator.counters["groups_duplicate"] == 1
    assert (state_of(desk, 0), desk.ledger.unaccounted) == (State.BUFFERED, 0)


def test_a_late_answer_to_a_lost_lease_is_as_good_and_the_other_server_may_stop():
    desk, leases = begin()
    desk.coordinator.drop_server(desk.fleet.servers[b"north"], "nothing heard", fault=True)
    desk.join("south", room=1000)
    desk.pump()
    assert [lease.attempt for lease in desk.leases("south")] == [2] * 6
    desk.coordinator.hello(b"north", make_hello())
    desk.receive(answer(leases[3]))
    desk.accept()
    assert desk.acks() == [(1, "ok", "")]
    assert state_of(desk, 3) is State.BUFFERED
    (cancel,) = desk.channel.to(b"south", Cancel)
    assert (cancel.group_id, cancel.reason) == (leases[3].group_id, "answered")
    assert desk.fleet.holder(leases[3].group_id) is None


def test_a_group_that_has_ended_is_a_duplicate():
    desk, leases = begin(max_attempts=1)
    desk.coordinator.lost(leases[0].group_id, fault=True, reason="engine failed")
    desk.receive(answer(leases[0]))
    desk.accept()
    assert desk.acks() == [(1, "duplicate", "")]
    assert desk.journal.ordinals() == []


def test_a_group_nobody_was_asked_for_is_not_journaled():
    desk, leases = begin()
    ordinal = 500
    desk.receive(answer(leases[0], ordinal=ordinal, group_id=desk.coordinator.train_id(ordinal)))
    desk.accept()
    assert desk.acks() == [(1, "duplicate", "not leased by this run")]
    assert desk.journal.records == []


def test_a_group_too_old_is_stale_and_its_prompt_sampled_again():
    desk = make_desk(policy_version=5, max_staleness=1)
    desk.join("north", live=5, room=1000)
    desk.pump()
    lease = desk.leases()[0]
    assert lease.min_version == Version(1, 4)
    desk.receive(answer(lease, version=Version(1, 3)))
    desk.accept()
    assert desk.acks() == [(1, "stale", "too old to train")]
    assert (desk.coordinator.counters["groups_stale"], state_of(desk, 0)) == (1, State.PENDING)
    assert desk.ledger.entries[0].faults == 0
    desk.pump()
    assert [(lease.ordinal, lease.attempt) for lease in desk.leases()] == [(0, 2)]


def test_a_group_that_got_too_old_while_it_was_journaled_is_sampled_again():
    """A late answer, older than what the ledger counts on, may be overtaken by a short step during the append."""

    async def scenario():
        desk, leases = begin(prompts_per_step=2, max_staleness=1, max_refill_ratio=0)
        desk.journal.gate.clear()
        desk.receive(answer(leases[3]))
        accepting = asyncio.create_task(desk.arrivals.accept_next())
        await asyncio.sleep(1)
        desk.ledger.policy_version = 3
        desk.journal.gate.set()
        await accepting
        assert desk.acks() == [(1, "ok", "")]
        assert (len(desk.buffer), state_of(desk, 3)) == (0, State.PENDING), "not forgotten (I8)"
        desk.fleet.went_live(b"north", Version(1, 3))
        desk.pump()
        assert [(lease.ordinal, lease.attempt) for lease in desk.leases()] == [(3, 2)]

    run_virtual(scenario())


def test_orphaned_tokens_are_stale_whatever_their_number():
    desk = make_desk(lineage=Lineage([(1, 0), (2, 5)]), incarnation=2, policy_version=5)
    desk.join("north", live=Version(2, 5), room=1000)
    desk.pump()
    lease = desk.leases()[0]
    spans = [[(Version(1, 5), 2), (Version(1, 6), 1)]] * 4
    desk.receive(answer(lease, spans=spans))
    desk.accept()
    assert desk.acks() == [(1, "stale", "sampled by version 1.6, which this run has left")]
    assert state_of(desk, 0) is State.PENDING


# Refused (I6)


def with_changes(**changes):
    return lambda lease: msgspec.structs.replace(answer(lease), **changes)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (with_changes(temperature=0.5), "group 0: temperature 0.5, leased at 1"),
        (with_changes(group_id="0" * 32), f"group 0: id {'0' * 32} is not that of its lease"),
        (with_changes(num_generations=5), "group 0: num_generations=5, the lease asked for 4"),
        (with_changes(reward_names=("length",)), "group 0: 1 reward names other than those agreed on: ['exact_match']"),
        (with_changes(rewards=np.array([1.0, np.nan, 0.0, 0.0], np.float32)), "group 0: rewards has a NaN"),
        (lambda lease: answer(lease, vocab_size=90, seed=3), "group 0: tokens from"),
        (
            lambda lease: msgspec.structs.replace(
                group := answer(lease), step_rewards=np.full(group.completion_tokens.size, np.inf, np.float32)
            ),
            "group 0: step_rewards has an infinity",
        ),
        (lambda lease: answer(lease, lengths=[9, 1, 1, 1]), "group 0: a completion of 9 tokens, allowed are 8"),
        (
            lambda lease: answer(lease, version=Version(1, 1)),
            "group 0: sampled by version 1.1, which was never trained",
        ),
    ],
)
def test_an_invalid_group_is_refused_with_its_reason_and_its_lease_given_again(spoil, reason):
    desk, leases = begin()
    desk.receive(spoil(leases[0]))
    desk.accept()
    ((attempt, status, said),) = desk.acks()
    assert (attempt, status) == (1, "refused")
    assert said.startswith(reason)
    assert desk.coordinator.counters["groups_refused"] == 1
    assert desk.coordinator.notices[-1].startswith(f"refused {reason}")
    assert (desk.journal.records, len(desk.buffer)) == ([], 0)
    assert (state_of(desk, 0), desk.ledger.entries[0].faults) == (State.PENDING, 1)
    desk.pump()
    assert [(lease.ordinal, lease.attempt) for lease in desk.leases()] == [(0, 2)]


def with_steps(lease):
    group = answer(lease)
    steps = np.full(group.completion_tokens.size, np.nan, np.float32)
    steps[np.cumsum(group.completion_lengths) - 1] = group.rewards
    steps[0] = 0.25
    return msgspec.structs.replace(group, step_rewards=steps)


@pytest.mark.parametrize(
    ("options", "reply", "notices"),
    [
        ({}, with_steps, ["group 0 has step rewards: advantage_estimator grpo trains on their sum, process on each of"
                          " them"]),
        ({"advantage_estimator": "process"}, with_steps, []),
        ({"advantage_estimator": "gae", "filter_zero_std": False}, with_steps, []),
        ({}, answer, []),
        ({"advantage_estimator": "process"}, answer, ["group 0 has no step rewards: its rewards count as one step each,"
                                                      " and advantage_estimator process is grpo"]),
    ],
)  # fmt: skip
def test_steps_that_nobody_compares_are_told_of_once(options, reply, notices):
    desk, leases = begin(**options)
    desk.coordinator.notices.clear()
    for lease in leases[:2]:
        desk.receive(reply(lease))
        desk.accept()
    assert [status for _, status, _ in desk.acks()] == ["ok", "ok"]
    assert list(desk.coordinator.notices) == notices
    assert len(desk.buffer) == 2


def test_a_group_whose_steps_are_all_equal_is_filtered_whatever_their_sums():
    desk, leases = begin(advantage_estimator="process")
    group = with_steps(leases[0])
    equal = np.where(np.isnan(group.step_rewards), np.nan, 0.5).astype(np.float32)
    desk.receive(msgspec.structs.replace(group, step_rewards=equal))
    desk.accept()
    assert (desk.ledger.ends[End.FILTERED], len(desk.buffer)) == (1, 0)


def test_a_group_refused_max_attempts_times_is_quarantined():
    desk, (lease, *_) = begin(max_attempts=3)
    for _ in range(3):
        desk.receive(answer(lease, temperature=0.5))
        desk.accept()
        desk.pump()
        (lease,) = [lease for lease in desk.leases() if lease.ordinal == 0] or [lease]
    assert (desk.ledger.ends[End.QUARANTINED], state_of(desk, 0)) == (1, None)
    assert any("group 0 quarantined: group 0: temperature 0.5" in notice for notice in desk.coordinator.notices)


def test_nobody_can_spoil_the_lease_of_another():
    desk, leases = begin()
    desk.join("evil", live=None)
    desk.receive(answer(leases[0], temperature=0.5), "evil")
    desk.receive(answer(leases[1], group_id="0" * 32), "evil")
    desk.accept()
    assert [status for _, status, _ in desk.acks("evil")] == ["refused", "refused"]
    assert [desk.ledger.entries[s].state for s in (0, 1)] == [State.LEASED] * 2
    assert desk.fleet.holder(leases[0].group_id) is desk.fleet.servers[b"north"]


def test_a_refused_answer_of_an_adopted_lease_is_leased_again():
    """The server's number of the attempt is not the ledger's after a reconnection."""
    desk, leases = begin()
    desk.join("north", peer=b"again", in_flight=(leases[0].group_id,))
    assert desk.ledger.entries[0].attempt == 2
    desk.receive(answer(leases[0], temperature=0.5), "again")
    desk.accept()
    assert state_of(desk, 0) is State.PENDING


def test_more_groups_than_were_ever_leased_are_refused():
    desk, leases = begin()
    desk.arrivals.queue = asyncio.Queue(1)
    desk.receive(answer(leases[0]))
    desk.receive(answer(leases[1]))
    assert desk.acks() == [(1, "refused", "more groups at once than were ever leased")]
    assert desk.coordinator.counters["groups_overflowed"] == 1
    assert (state_of(desk, 0), state_of(desk, 1)) == (State.LEASED, State.PENDING)


def test_the_sender_of_a_good_group_may_be_gone():
    desk, leases = begin()
    desk.receive(answer(leases[0]))
    desk.channel.gone.add(b"north")
    desk.accept()
    assert len(desk.buffer) == 1


def test_a_server_may_say_goodbye_right_behind_its_last_group():
    desk, leases = begin()
    desk.receive(answer(leases[0]))
    desk.coordinator.drop_server(desk.fleet.servers[b"north"], "drained", fault=False)
    desk.accept()
    assert state_of(desk, 0) is State.BUFFERED
    assert [state_of(desk, ordinal) for ordinal in range(1, 6)] == [State.PENDING] * 5


# Parts


def test_parts_are_put_together_in_whatever_order_they_come():
    desk, leases = begin()
    parts = split_group(answer(leases[0]), max_bytes=100)
    assert len(parts) == 4
    for part in reversed(parts):
        assert desk.arrivals.queue.empty()
        desk.receive(part)
    desk.accept()
    assert desk.acks() == [(1, "ok", "")]
    (train,) = desk.buffer.take([0])
    assert train.group.num_parts == 1
    assert np.array_equal(train.group.completion_tokens, answer(leases[0]).completion_tokens)


def test_parts_that_contradict_each_other_are_refused_at_once():
    desk, leases = begin()
    parts = split_group(answer(leases[0]), max_bytes=200)
    desk.receive(parts[0])
    desk.receive(msgspec.structs.replace(parts[1], temperature=0.5))
    assert [(status, reason) for _, status, reason in desk.acks()] == [
        ("refused", "group 0: its parts differ in temperature")
    ]
    assert state_of(desk, 0) is State.PENDING


# Evaluation


def begin_evaluation(*, pinned: bool = True, **options) -> tuple[Desk, Evaluation, list[Lease]]:
    desk = make_desk(eval_rows=2, eval_num_generations=2, **options)
    desk.join("north", room=1000)
    desk.coordinator.training = False
    evaluation = desk.coordinator.evaluation = Evaluation(policy_version=0, pinned=pinned, num_rows=2)
    desk.pump()
    return desk, evaluation, desk.leases()


def test_evaluation_results_are_acknowledged_without_the_journal():
    desk, evaluation, leases = begin_evaluation()
    for lease in leases:
        desk.receive(answer(lease))
    desk.accept()
    assert desk.acks() == [(1, "ok", ""), (1, "ok", "")]
    assert (evaluation.done, evaluation.result().reward) == (True, 0.5)
    assert (desk.journal.records, len(desk.buffer)) == ([], 0)
    assert desk.fleet.servers[b"north"].samples == 0
    desk.receive(answer(leases[0]))
    desk.accept()
    assert desk.acks()[2:] == [(1, "duplicate", "that evaluation is over")]


def test_a_pinned_evaluation_asks_again_for_what_newer_weights_sampled():
    desk, evaluation, leases = begin_evaluation()
    desk.ledger.policy_version = 1
    desk.receive(answer(leases[0], version=Version(1, 1)))
    desk.accept()
    assert list(evaluation.pending) == [0]
    desk.pump()
    assert [(lease.ordinal, lease.attempt) for lease in desk.leases()] == [(0, 2)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"temperature": 0.7}, "group 0: temperature 0.7, leased at 1"),
        ({"ordinal": 1}, "group 1: id"),
        ({"rewards": (1.0, 0.0, 1.0)}, "group 0: num_generations=3, the lease asked for 2"),
    ],
)
def test_an_invalid_evaluation_result_is_refused_and_its_row_asked_for_again(changes, reason):
    desk, evaluation, leases = begin_evaluation()
    group_id = leases[0].group_id
    desk.receive(answer(leases[0], **{"group_id": group_id, **changes}))
    desk.accept()
    ((_, status, said),) = desk.acks()
    assert status == "refused"
    assert said.startswith(reason)
    assert (list(evaluation.pending), evaluation.leased) == ([0], {1})
    desk.pump()
    assert [(lease.ordinal, lease.attempt) for lease in desk.leases()] == [(0, 2)]


def test_a_damaged_part_of_an_evaluation_that_is_over_touches_no_training_lease():
    desk, leases = begin()
    evaluation = answer(leases[0], purpose=Purpose.EVAL, group_id="e" * 32)
    parts = split_group(evaluation, max_bytes=200)
    desk.receive(parts[0])
    desk.receive(msgspec.structs.replace(parts[1], temperature=0.5))
    assert [status for _, status, _ in desk.acks()] == ["refused"]
    assert desk.fleet.holder(leases[0].group_id) is not None
    assert state_of(desk, 0) is State.LEASED


# Restored from the journal of an earlier incarnation


def test_restored_groups_are_admitted_when_their_prompt_is_under_way():
    desk, _ = begin()
    restored = {
        1: make_train_group(ordinal=1, sequence=77),
        2: make_train_group(ordinal=2, rewards=(1.0, 1.0, 1.0, 1.0)),
        50: make_train_group(ordinal=50),
    }
    desk.arrivals.restore(restored)
    assert [desk.ledger.entries[1].state, state_of(desk, 2)] == [State.BUFFERED, None]
    assert desk.ledger.ends[End.FILTERED] == 1
    assert desk.buffer.take([1])[0].sequence == 1, "under the sequence number it has now"
    assert desk.coordinator.counters["groups_restored"] == 2
    assert list(desk.arrivals.restored) == [50]


def test_a_restored_group_beyond_the_cursor_spares_its_lease_when_granted():
    desk = make_desk()
    desk.arrivals.restore({ordinal: make_train_group(ordinal=ordinal) for ordinal in (0, 4)})
    desk.join("north", room=1000)
    desk.pump()
    assert [lease.ordinal for lease in desk.leases()] == [1, 2, 3, 5]
    assert [state_of(desk, ordinal) for ordinal in (0, 4)] == [State.BUFFERED] * 2
    assert desk.arrivals.restored == {}


def test_a_restored_group_too_old_for_its_new_place_is_sampled_again():
    desk = make_desk(policy_version=5, max_staleness=1)
    desk.arrivals.restore({0: make_train_group(ordinal=0, version=Version(1, 3))})
    desk.join("north", live=5, room=1000)
    desk.pump()
    assert desk.leases()[0].ordinal == 0
    assert desk.coordinator.counters["groups_restored"] == 0


def test_batch_loop_hears_of_a_restored_group():
    async def scenario():
        desk = make_desk()
        desk.arrivals.restore({0: make_train_group(ordinal=0)})
        waiting = asyncio.ensure_future(desk.coordinator.changed.wait())
        await asyncio.sleep(0)
        desk.pump()
        await asyncio.wait_for(waiting, 1)

    run_virtual(scenario())


def test_acks_name_the_attempt_they_answer():
    desk, leases = begin()
    desk.receive(answer(leases[0], attempt=7))
    desk.accept()
    (ack,) = desk.channel.to(b"north", Ack)
    assert (ack.group_id, ack.attempt) == (leases[0].group_id, 7)


def test_accepting_waits_for_arrivals():
    async def scenario():
        desk, leases = begin()
        accepting = asyncio.create_task(desk.arrivals.accept_next())
        await asyncio.sleep(1)
        assert not accepting.done()
        desk.receive(answer(leases[0]))
        await accepting
        assert len(desk.buffer) == 1

    run_virtual(scenario())
