"""Going on by replay: the ledger comes out as the one that died, and the run begins after the steps on disk."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from learner.checkpoint import Checkpoint, CheckpointState
from learner.journal_records import EndRecord, IncarnationRecord, Record, StepRecord
from learner.ledger import End, Ledger, LedgerSnapshot
from learner.replay.index import index_journal
from learner.replay.resume import Replayed, tell_ledger
from learner.resume import begin
from learner.staleness import derive_bounds
from protocol.versions import Version
from tests.journals import group_record, step, write

BOUNDS = derive_bounds(max_staleness=2, prompts_per_step=2)
TOO_LONG = {3, 9}


def is_too_long(ordinal: int) -> bool:
    return ordinal in TOO_LONG


def filtered(ordinal: int, sequence: int, at: int, how: str = "filtered") -> EndRecord:
    return EndRecord(incarnation=1, ordinal=ordinal, sequence=sequence, end=how, step=at, reason="")


class Living:
    """A ledger that is driven as the learner drives it, with its journal."""

    def __init__(self) -> None:
        self.ledger = Ledger(BOUNDS)
        self.records: list[Record] = [IncarnationRecord(incarnation=1, resumed_from=0)]
        self.late: list[Record] = []
        """Ends that wait for the next append."""

    def fill(self) -> None:
        while self.ledger.can_grant():
            if self.ledger.cursor in TOO_LONG:
                self.late.append(filtered(self.ledger.filter_unleased(), -1, self.ledger.policy_version))
            else:
                self.ledger.grant()
        for entry in self.ledger.pending():
            self.ledger.dispatched(entry.sequence, "north", self.ledger.policy_version)

    def deliver(self, *ordinals: int, end: str = "") -> None:
        for ordinal in ordinals:
            entry = self.ledger.find(ordinal)
            assert entry is not None
            version = Version(1, entry.floor)
            self.records += [group_record(ordinal, sequence=entry.sequence, version=version), *self.late]
            self.late = []
            self.ledger.delivered(ordinal, entry.floor)
            if end:
                self.ledger.end(entry.sequence, End(end))
                self.late.append(filtered(ordinal, entry.sequence, self.ledger.policy_version, end))

    def train(self) -> None:
        sequences = self.ledger.select()
        assert len(sequences) == 2
        self.ledger.batch(sequences)
        ordinals = [self.ledger.entries[sequence].ordinal for sequence in sequences]
        number = self.ledger.policy_version + 1
        self.records += [step(number, *ordinals), *self.late]
        self.late = []
        self.ledger.trained(sequences, number)
        self.ledger.live(number)


def live() -> tuple[Living, LedgerSnapshot]:
    """Four steps; a checkpoint after the first. Rows too long, groups filtered and quarantined on the way."""
    living = Living()
    living.fill()
    living.deliver(0, 1)
    living.train()
    snapshot = living.ledger.snapshot()
    living.fill()
    living.deliver(2, end="filtered")
    living.fill()  # its slot is free before its end is on disk
    living.deliver(5, 4)
    living.train()
    living.fill()
    living.deliver(6, end="quarantined")
    living.deliver(8, end="filtered")  # the checkpoint has not even granted it
    living.fill()
    living.deliver(7, 10)
    living.train()
    living.fill()
    living.deliver(11, 12)
    living.train()
    living.deliver(13)  # on disk, not trained
    return living, snapshot


def test_the_ledger_comes_out_as_it_was(tmp_path):
    living, snapshot = live()
    write(tmp_path, *living.records)
    ledger = Ledger(BOUNDS)
    ledger.restore(snapshot)
    tell_ledger(ledger, index_journal(tmp_path), 4, is_too_long)
    assert (ledger.policy_version, ledger.unaccounted) == (4, 0)
    assert ledger.ends == living.ledger.ends
    # Prompts that were granted and of which nothing came are granted again: in that order, with those numbers.
    while ledger.cursor < living.ledger.cursor:
        if is_too_long(ledger.cursor):
            ledger.filter_unleased()
        else:
            ledger.grant()
    told, lived = ledger.snapshot(), living.ledger.snapshot()
    assert (told["cursor"], told["next_sequence"]) == (lived["cursor"], lived["next_sequence"])
    assert [entry[:2] for entry in told["entries"]] == [entry[:2] for entry in lived["entries"]]


@pytest.mark.parametrize("last", [1, 2, 3])
def test_it_stops_where_the_replay_stopped(last, tmp_path):
    living, snapshot = live()
    write(tmp_path, *living.records)
    ledger = Ledger(BOUNDS)
    ledger.restore(snapshot)
    tell_ledger(ledger, index_journal(tmp_path), last, is_too_long)
    assert (ledger.policy_version, ledger.ends[End.TRAINED], ledger.unaccounted) == (last, 2 * last, 0)


def test_the_run_begins_after_the_steps_on_disk_and_every_version_of_them_stays(tmp_path):
    living, snapshot = live()
    write(tmp_path, *living.records)
    state = CheckpointState(
        run_id="run", incarnation=1, forks=((1, 0),), policy_version=1, config_fingerprint="",
        ledger=cast("dict[str, object]", snapshot),
    )  # fmt: skip
    ledger = Ledger(BOUNDS)
    index = index_journal(tmp_path, state.forks)
    start = begin(
        ledger, Checkpoint(Path("step"), 1, state), incarnation=2, journal_dir=tmp_path,
        replayed=Replayed(index=index, steps=3), too_long=is_too_long,
    )  # fmt: skip
    assert start.lineage.forks == [(1, 0), (2, 4)]
    assert Version(1, 4) in start.lineage
    assert sorted(start.restored) == [13], "what is trained or has ended is not trained again"
    assert ledger.policy_version == 4


def test_steps_and_ends_that_were_left_behind_are_not_told(tmp_path):
    """2 resumed from checkpoint 1 without a replay: steps 2 to 4 of the first learner, and its ends, are gone."""
    living, snapshot = live()
    again = StepRecord(incarnation=2, step=2, ordinals=(4, 5), learning_rate=1e-5, num_micro_batches=2)
    write(tmp_path, *living.records, IncarnationRecord(incarnation=2, resumed_from=1), again)
    index = index_journal(tmp_path)
    assert index.lineage.forks == [(1, 0), (2, 1)]
    assert sorted(index.steps) == [1, 2]
    assert index.steps[2].record.ordinals == (4, 5)
    ledger = Ledger(BOUNDS)
    ledger.restore(snapshot)
    tell_ledger(ledger, index, 2, is_too_long)
    assert (ledger.policy_version, ledger.ends[End.QUARANTINED]) == (2, 0)
    assert ledger.find(2) is not None, "it was filtered after the checkpoint: the second learner has it back"
