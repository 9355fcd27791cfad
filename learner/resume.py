"""Where a run begins: at the initial weights, or where the last learner was cut off.

Versions up to the checkpoint stay valid; what the old incarnation trained after it is orphaned. Groups in the journal
that the checkpoint has not trained, and whose tokens all belong to the surviving lineage, go back to the buffer
(`requeue`); everything else that was under way is leased again, under the same ordinal. Where the steps after the
checkpoint were trained again first (`replay`, learner/replay/), nothing is orphaned, and the run begins after them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from learner.batch import TrainGroup
from learner.checkpoint import Checkpoint
from learner.journal_records import GroupRecord, IncarnationRecord, KnobRecord
from learner.journal_segments import JournalReport, read_journal
from learner.knobs.core import joined_history
from learner.ledger import Ledger, LedgerSnapshot
from learner.replay.resume import Replayed, tell_ledger
from learner.token_ledger import group_digest
from protocol.completions import group_versions
from protocol.logs import event
from protocol.versions import Lineage

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Start:
    """From where this incarnation goes on."""

    lineage: Lineage
    restored: dict[int, TrainGroup]
    """Journaled groups that may still train, by ordinal."""
    knobs: list[KnobRecord]
    """Every change of a live knob so far: what a knob was set to stays, whichever weights are gone."""
    incarnations: tuple[IncarnationRecord, ...]
    """The beginnings of the learners before this one, of those that the lineage still has."""
    digests: dict[str, bytes]
    """Of every journaled group of the lineage, by id: a server that has not heard so may send it again."""


def begin(
    ledger: Ledger,
    checkpoint: Checkpoint | None,
    *,
    incarnation: int,
    journal_dir: Path,
    replayed: Replayed | None = None,
    too_long: Callable[[int], bool] = lambda ordinal: False,
) -> Start:
    """Restore the ledger and find the groups that need not be sampled again. Reads the journal: not on the loop.

    Args:
        ledger: new.
        checkpoint: to go on from; None: the initial weights.
        incarnation: of this learner.
        journal_dir: of the run.
        replayed: what was trained again after the checkpoint: versions up to there stay valid.
        too_long: whether an ordinal's row gets no lease; asked of those that were granted after the checkpoint.
    """
    forks = [] if checkpoint is None else list(checkpoint.state.forks)
    first = 0 if checkpoint is None else checkpoint.policy_version
    if checkpoint is not None:
        ledger.restore(cast("LedgerSnapshot", checkpoint.state.ledger))
    if replayed is not None and replayed.steps:
        first += replayed.steps
        forks = [fork for fork in replayed.index.lineage.forks if fork[1] <= first]
        tell_ledger(ledger, replayed.index, first, too_long)
    lineage = Lineage([*forks, (incarnation, first)])
    report = JournalReport()
    restored: dict[int, TrainGroup] = {}
    digests: dict[str, bytes] = {}
    journaled: list[KnobRecord] = []
    begun = {record.incarnation: record for record in (checkpoint.state.incarnations if checkpoint else ())}
    orphaned = 0
    for record in read_journal(journal_dir, report):
        if isinstance(record, IncarnationRecord):
            begun[record.incarnation] = record
            if _began_here(record, forks, incarnation, first):
                forks.append((record.incarnation, first))
                lineage = Lineage([*forks, (incarnation, first)])
        if isinstance(record, KnobRecord):
            journaled.append(record)
        if not isinstance(record, GroupRecord):
            continue
        ordinal = record.group.ordinal
        ended = ordinal < ledger.cursor and ledger.find(ordinal) is None  # in this lineage
        if all(version in lineage for version in group_versions(record.group)):
            digests[record.group.group_id] = group_digest(record.group)
            if not ended:
                restored[ordinal] = record.train_group()
        else:
            orphaned += not ended
    for damage in report.damages:
        event(log, "journal_damage", level=logging.WARNING, text=damage)
    event(
        log, "begun", incarnation=incarnation, policy_version=ledger.policy_version, records=report.num_records,
        restored=len(restored), orphaned=orphaned,
    )  # fmt: skip
    return Start(
        lineage=lineage,
        restored=restored,
        knobs=joined_history(checkpoint.state.knobs if checkpoint else (), journaled),
        incarnations=tuple(begun[number] for number, _ in forks if number in begun),
        digests=digests,
    )


def _began_here(record: IncarnationRecord, forks: list[tuple[int, int]], incarnation: int, first: int) -> bool:
    """Whether a learner that died without a checkpoint of its own began with these very weights: they stay valid."""
    last = forks[-1][0] if forks else 0
    return last < record.incarnation < incarnation and record.resumed_from == first
