"""Which steps a journal holds, with the place of every group that they trained.

Only steps that led to the run's last weights count: what a learner trained after the checkpoint that the next one went
on from belongs to weights that are gone. Which those are, the incarnations tell; so the journal is read to its end
before any step of it is trained. Groups are not kept, only where they are: they are read again when it is their turn.
A learner that goes on may prune the journal meanwhile: so a place is one in a segment, which moves nothing that stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from learner.batch import Batch, TrainGroup
from learner.journal_records import EndRecord, GroupRecord, IncarnationRecord, Record, StepRecord
from learner.journal_segments import Damage, JournalReport, read_journal, scan_journal
from protocol.completions import group_versions
from protocol.errors import ConfigError
from protocol.versions import Lineage, Version

Place: TypeAlias = tuple[int, int]
"""Number of a segment, and of a record in it."""


@dataclass(frozen=True, slots=True)
class IndexedStep:
    """A step that was journaled."""

    record: StepRecord
    places: tuple[Place | None, ...]
    """Of its groups' records in the journal, in training order; None where one is not there any more."""

    @property
    def whole(self) -> bool:
        """Whether it can be trained again."""
        return None not in self.places


@dataclass(kw_only=True)
class JournalIndex:
    """See the module's text."""

    lineage: Lineage
    """Of the last weights."""
    incarnations: dict[int, IncarnationRecord] = field(default_factory=dict)
    """Those whose beginning is known."""
    steps: dict[int, IndexedStep] = field(default_factory=dict)
    """By number."""
    events: list[StepRecord | EndRecord] = field(default_factory=list)
    """What ended how, in the order written: steps, and ends of other kinds."""
    damages: list[Damage] = field(default_factory=list)

    def last_after(self, start: int) -> int:
        """The last step that can be reached from the weights of `start`, every step between being whole."""
        last = start
        while last + 1 in self.steps and self.steps[last + 1].whole:
            last += 1
        return last


def index_journal(
    journal_dir: Path, forks: Sequence[tuple[int, int]] = (), incarnations: Sequence[IncarnationRecord] = ()
) -> JournalIndex:
    """Read a whole journal.

    Args:
        journal_dir: of the run.
        forks: of the newest checkpoint; the beginnings of old incarnations may not be in the journal any more.
        incarnations: of the newest checkpoint, for the same reason.

    Raises:
        JournalError: it is of another version.
    """
    report = JournalReport()
    begun = {record.incarnation: record for record in incarnations}
    index = JournalIndex(lineage=_lineage(journal_dir, forks), incarnations=begun)
    groups: dict[int, Place] = {}  # ordinal -> where the last group of it is that may train
    for place, record in _placed(journal_dir, report):
        match record:
            case GroupRecord():
                if all(version in index.lineage for version in group_versions(record.group)):
                    groups[record.group.ordinal] = place
            case StepRecord() if Version(record.incarnation, record.step) in index.lineage:
                index.steps[record.step] = IndexedStep(record, tuple(groups.get(o) for o in record.ordinals))
                index.events.append(record)
            case EndRecord() if Version(record.incarnation, record.step) in index.lineage:
                index.events.append(record)
            case IncarnationRecord():
                index.incarnations[record.incarnation] = record
                if not record.replayed:  # its ledger was the checkpoint's: what ended after that had not, for it
                    index.events = [
                        event for event in index.events
                        if isinstance(event, StepRecord) or event.step < record.resumed_from
                    ]  # fmt: skip
            case _:
                pass
    index.damages = report.damages
    return index


def batches(journal_dir: Path, steps: Sequence[IndexedStep]) -> Iterator[Batch]:
    """Yield the batch of each step, reading the journal once. All must be whole, and in order.

    Raises:
        ConfigError: a group has gone since the journal was indexed.
    """
    wanted = {place for step in steps for place in step.places}
    groups: dict[Place | None, TrainGroup] = {}
    waiting = list(reversed(steps))
    for place, record in _placed(journal_dir, JournalReport()):
        if place in wanted and isinstance(record, GroupRecord):
            groups[place] = record.train_group()
        while waiting and all(needed in groups for needed in waiting[-1].places):
            step = waiting.pop()
            yield Batch(step=step.record.step, groups=tuple(groups.pop(needed) for needed in step.places))
        if not waiting:
            return
    if waiting:
        lost = waiting[-1].record.step
        raise ConfigError(f"{journal_dir} was cut while it was read, at step {lost}: the run goes on; replay it again")


def _placed(journal_dir: Path, report: JournalReport) -> Iterator[tuple[Place, Record]]:
    """Every record, with its place."""
    records: Counter[int] = Counter()
    for segment, record in scan_journal(journal_dir, report):
        yield (segment, records[segment]), record
        records[segment] += 1


def _lineage(journal_dir: Path, forks: Sequence[tuple[int, int]]) -> Lineage:
    known = list(forks)
    newest = known[-1][0] if known else 0
    for record in read_journal(journal_dir):
        if isinstance(record, IncarnationRecord) and record.incarnation > newest:
            known = [fork for fork in known if fork[1] <= record.resumed_from]
            known.append((record.incarnation, record.resumed_from))
    return Lineage(known)
