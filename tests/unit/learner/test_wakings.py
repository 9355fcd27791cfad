"""Who is woken when something happens that no server has a part in: a wait that nobody ends is a hang (I8)."""

from __future__ import annotations

import asyncio

from learner.batch import Batch
from learner.evaluation import Evaluation
from learner.journal_records import GroupRecord
from learner.leases import prompt_text
from learner.leasing import pump
from learner.ledger import State
from learner.loops import batch_loop
from protocol.waits import Waits
from tests.factories import make_group
from tests.learners import Desk, answer, make_desk, run


def restore(desk: Desk, ordinals: range) -> None:
    rows = {ordinal: desk.coordinator.prompts.row(ordinal) for ordinal in ordinals}
    desk.arrivals.restore(
        {
            ordinal: GroupRecord(
                incarnation=1,
                prompt=prompt_text(row),
                prompt_tokens=row.prompt_tokens,
                group=make_group(ordinal=ordinal),
            ).train_group()
            for ordinal, row in rows.items()
            if row is not None
        }
    )


def test_groups_restored_from_the_journal_make_a_batch_without_any_server():
    desk = make_desk()
    restore(desk, range(2))

    async def first_batch() -> Batch:
        batches: asyncio.Queue[Batch] = asyncio.Queue(1)
        loop = asyncio.create_task(batch_loop(desk.coordinator, desk.buffer, batches, Waits()))
        await asyncio.sleep(0)  # it has looked, found nothing, and waits
        desk.pump()
        batch = await asyncio.wait_for(batches.get(), 1.0)
        loop.cancel()
        return batch

    assert [group.ordinal for group in run(first_batch()).groups] == [0, 1]


def test_an_evaluation_whose_last_rows_are_too_long_is_known_to_be_done():
    desk = make_desk(eval_rows=2, too_long=(0, 1))
    desk.coordinator.evaluation = Evaluation(policy_version=0, pinned=True, num_rows=2)

    async def told() -> None:
        waiting = asyncio.create_task(desk.coordinator.changed.wait())
        await asyncio.sleep(0)
        pump(desk.coordinator)
        await asyncio.wait_for(waiting, 1.0)

    run(told())
    assert desk.coordinator.evaluation.done


def test_a_group_that_is_too_old_once_it_is_on_disk_is_leased_again():
    desk = make_desk(max_staleness=0, max_refill_ratio=0)
    desk.join("north")
    desk.pump()
    first, second = desk.leases()

    async def overtaken() -> None:
        desk.journal.gate.clear()
        desk.receive(answer(second))
        accepting = asyncio.create_task(desk.arrivals.accept_next())
        await asyncio.sleep(0)
        desk.ledger.policy_version = 1  # what a short step does while the disk is busy
        desk.journal.gate.set()
        await accepting

    run(overtaken())
    assert desk.ledger.entries[second.sequence].state is State.PENDING
    assert desk.ledger.entries[first.sequence].state is State.LEASED
