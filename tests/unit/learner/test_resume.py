"""Where a run begins again: what of the journal may still train, what is orphaned, what has ended."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from learner.checkpoint import Checkpoint, CheckpointState
from learner.journal_records import IncarnationRecord, Record, record_frames
from learner.journal_writer import SegmentWriter
from learner.ledger import End, Ledger, LedgerSnapshot
from learner.resume import Start, begin
from learner.staleness import derive_bounds
from protocol.versions import Version
from tests.journals import end, group_record, step

BOUNDS = derive_bounds(max_staleness=2, prompts_per_step=2)


def write(directory: Path, *records: Record) -> None:
    writer = SegmentWriter(directory, segment_bytes=1 << 20)
    writer.write([(record, record_frames(record)) for record in records])
    writer.close()


def make_checkpoint(
    policy_version: int = 1, *, ledger: LedgerSnapshot | None = None, forks: tuple[tuple[int, int], ...] = ((1, 0),),
    incarnations: tuple[IncarnationRecord, ...] = (),
) -> Checkpoint:  # fmt: skip
    state = CheckpointState(
        run_id="run", incarnation=forks[-1][0], forks=forks, policy_version=policy_version, config_fingerprint="f",
        ledger=ledger or trained_ledger(policy_version).snapshot(), incarnations=incarnations,
    )  # fmt: skip
    return Checkpoint(Path("checkpoints/step"), policy_version, state)


def trained_ledger(policy_version: int) -> Ledger:
    """A ledger that has trained so many steps of two, with the six slots after them granted."""
    ledger = Ledger(BOUNDS)
    for version in range(policy_version + 1):
        while ledger.can_grant():
            entry = ledger.grant()
            ledger.dispatched(entry.sequence, "north", version)
        if version < policy_version:
            batch = [2 * version, 2 * version + 1]
            for sequence in batch:
                ledger.delivered(sequence, version)
            ledger.batch(batch)
            ledger.trained(batch, version + 1)
            ledger.live(version + 1)
    return ledger


def resume(directory: Path, checkpoint: Checkpoint | None, *, incarnation: int = 2) -> tuple[Ledger, Start]:
    ledger = Ledger(BOUNDS)
    return ledger, begin(ledger, checkpoint, incarnation=incarnation, journal_dir=directory)


def test_a_new_run_begins_at_nothing(tmp_path):
    ledger, start = resume(tmp_path, None, incarnation=1)
    assert (start.lineage.forks, start.restored) == ([(1, 0)], {})
    assert (ledger.cursor, ledger.policy_version) == (0, 0)


def test_without_a_checkpoint_what_the_initial_weights_sampled_still_trains(tmp_path):
    write(
        tmp_path,
        IncarnationRecord(incarnation=1, resumed_from=0),
        group_record(0, version=Version(1, 0)),
        step(1, 0),
        group_record(1, version=Version(1, 1)),
    )
    ledger, start = resume(tmp_path, None)
    assert sorted(start.restored) == [0], "version 1.1 died with its learner"
    assert Version(1, 0) in start.lineage
    assert Version(1, 1) not in start.lineage
    assert Version(2, 1) in start.lineage
    assert ledger.cursor == 0, "every prompt is granted again, in the same order"


def test_the_ledger_goes_on_from_the_checkpoint(tmp_path):
    ledger, start = resume(tmp_path, make_checkpoint(1))
    assert (ledger.policy_version, ledger.cursor, ledger.ends[End.TRAINED]) == (1, 8, 2)
    assert [entry.ordinal for entry in ledger.pending()] == [2, 3, 4, 5, 6, 7]
    assert start.lineage.forks == [(1, 0), (2, 1)]
    assert ledger.unaccounted == 0


def test_groups_that_the_checkpoint_has_not_trained_go_back_to_the_buffer(tmp_path):
    write(tmp_path, *(group_record(ordinal) for ordinal in range(6)), end(5))
    _, start = resume(tmp_path, make_checkpoint(1))
    assert sorted(start.restored) == [2, 3, 4, 5], "0 and 1 are trained; 5 ended after the checkpoint: once more"
    assert len(start.digests) == 6, "whichever their servers send again counts once"
    assert start.restored[3].ordinal == 3
    assert start.restored[3].prompt == "2 + 3 ="


def test_groups_beyond_the_cursor_wait_for_their_prompt(tmp_path):
    write(tmp_path, group_record(20))
    ledger, start = resume(tmp_path, make_checkpoint(1))
    assert (sorted(start.restored), ledger.find(20)) == ([20], None)


def test_tokens_of_versions_after_the_checkpoint_are_orphaned(tmp_path, caplog):
    mixed = [[(Version(1, 1), 2), (Version(1, 2), 1)]] * 4
    write(
        tmp_path,
        group_record(2, version=Version(1, 1)),
        group_record(3, version=Version(1, 2)),
        group_record(4, spans=mixed),
    )
    with caplog.at_level(logging.INFO, "learner.resume"):
        _, start = resume(tmp_path, make_checkpoint(1))
    assert sorted(start.restored) == [2]
    assert "restored=1 orphaned=2" in caplog.text


def test_the_last_answer_of_an_ordinal_counts_unless_it_is_orphaned(tmp_path):
    write(
        tmp_path,
        group_record(2, seed=1, attempt=1),
        group_record(2, seed=2, attempt=2),
        group_record(3, seed=1, attempt=1),
        group_record(3, seed=2, attempt=2, version=Version(1, 2)),
    )
    _, start = resume(tmp_path, make_checkpoint(1))
    assert {ordinal: group.group.attempt for ordinal, group in start.restored.items()} == {2: 2, 3: 1}


def test_a_learner_that_died_without_a_checkpoint_began_with_the_same_weights(tmp_path):
    """2 resumed from version 1 and died before it saved; 3 resumes from there too. What 2.1 sampled is as good."""
    write(
        tmp_path,
        IncarnationRecord(incarnation=1, resumed_from=0),
        IncarnationRecord(incarnation=2, resumed_from=1),
        group_record(2, version=Version(2, 1), incarnation=2),
        group_record(3, version=Version(2, 2), incarnation=2),
    )
    _, start = resume(tmp_path, make_checkpoint(1), incarnation=3)
    assert sorted(start.restored) == [2]
    assert Version(2, 1) in start.lineage
    assert Version(2, 2) not in start.lineage
    assert Version(3, 2) in start.lineage


def test_a_learner_that_went_on_from_elsewhere_leaves_nothing_behind(tmp_path):
    """2 resumed from version 3, whose checkpoint is damaged now: 3 falls back to 1, and 2 never belonged to it."""
    write(
        tmp_path,
        IncarnationRecord(incarnation=1, resumed_from=0),
        IncarnationRecord(incarnation=2, resumed_from=3),
        group_record(2, version=Version(2, 3), incarnation=2),
        group_record(3, version=Version(1, 1)),
    )
    _, start = resume(tmp_path, make_checkpoint(1), incarnation=3)
    assert sorted(start.restored) == [3]
    assert start.lineage.forks == [(1, 0), (3, 1)]


def test_a_chain_of_restarts_keeps_every_surviving_part(tmp_path):
    forks = ((1, 0), (2, 1), (4, 2))
    write(
        tmp_path,
        group_record(6, version=Version(1, 1)),
        group_record(7, version=Version(2, 2)),
        group_record(8, version=Version(4, 3)),
        group_record(9, version=Version(3, 1)),
        group_record(10, version=Version(2, 3)),
    )
    _, start = resume(tmp_path, make_checkpoint(3, forks=forks), incarnation=5)
    assert sorted(start.restored) == [6, 7, 8]
    assert start.lineage.forks == [*forks, (5, 3)]


def test_how_each_learner_of_the_lineage_began_is_known_though_the_journal_is_pruned(tmp_path):
    began = [
        IncarnationRecord(incarnation=number, resumed_from=first, config=f"{number}")
        for number, first in ((1, 0), (2, 1), (3, 9), (4, 2))
    ]
    write(tmp_path, *began[2:])  # 3 went on from weights that are gone
    checkpoint = make_checkpoint(2, forks=((1, 0), (2, 1)), incarnations=(began[0], began[1]))
    _, start = resume(tmp_path, checkpoint, incarnation=5)
    assert start.lineage.forks == [(1, 0), (2, 1), (4, 2), (5, 2)]
    assert start.incarnations == (began[0], began[1], began[3])


def test_damage_in_the_journal_is_told_and_costs_only_what_it_hit(tmp_path, caplog):
    write(tmp_path, group_record(2), group_record(3))
    (segment,) = tmp_path.iterdir()
    segment.write_bytes(segment.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING, "learner.resume"):
        _, start = resume(tmp_path, make_checkpoint(1))
    assert sorted(start.restored) == [2]
    assert "event=journal_damage" in caplog.text


def test_incarnations_only_grow(tmp_path):
    checkpoint = make_checkpoint(1, forks=((1, 0), (4, 1)))
    _, start = resume(tmp_path, checkpoint, incarnation=5)
    assert start.lineage.forks[-1] == (5, 1)
    assert Version(4, 1) in start.lineage


@pytest.mark.parametrize("policy_version", [0, 3])
def test_restored_groups_take_up_no_more_than_their_slots(tmp_path, policy_version):
    """What is under way in the checkpoint holds its slot already; what lies beyond the cursor waits for one."""
    write(tmp_path, *(group_record(ordinal) for ordinal in range(40)))
    ledger, start = resume(tmp_path, make_checkpoint(policy_version))
    assert ledger.slots_in_use == 6
    under_way = [ordinal for ordinal in start.restored if ledger.find(ordinal)]
    assert len(under_way) == 6
    assert set(start.restored) == set(range(2 * policy_version, 40))
