"""What a run's journal says about I3: which ordinals were trained in the lineage of its last weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from learner.journal_records import EndRecord, GroupRecord, IncarnationRecord, StepRecord
from learner.journal_segments import JournalReport, read_journal


@dataclass
class Lineage:
    """The journal of a run, reduced."""

    steps: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Ordinals by step, of the steps that led to the last weights."""
    orphaned: list[int] = field(default_factory=list)
    """Steps that were journaled, and then left behind by a resume from an earlier checkpoint."""
    incarnations: list[tuple[int, int]] = field(default_factory=list)
    """(incarnation, policy_version it resumed from)"""
    ended: dict[int, EndRecord] = field(default_factory=dict)
    """Other ends by ordinal, in the lineage: what orphaned weights made of a prompt is left behind with them."""
    groups: dict[int, list[GroupRecord]] = field(default_factory=dict)
    """Every accepted group by ordinal."""

    @property
    def trained(self) -> list[int]:
        """Ordinals in the order trained; one that appears twice was trained twice."""
        return [ordinal for _, ordinals in sorted(self.steps.items()) for ordinal in ordinals]

    def sampled_by(self, ordinal: int) -> int:
        """The largest token of the group as it was last accepted: servers here differ in their vocabularies."""
        return int(np.max(self.groups[ordinal][-1].group.completion_tokens))


def read_lineage(run_dir: Path) -> Lineage:
    """Read the whole journal; it must be undamaged but for a torn end."""
    report, lineage = JournalReport(), Lineage()
    for record in read_journal(run_dir / "journal", report):
        match record:
            case IncarnationRecord():
                lineage.incarnations.append((record.incarnation, record.resumed_from))
                orphaned = [step for step in lineage.steps if step > record.resumed_from]
                lineage.orphaned += orphaned
                for step in orphaned:
                    del lineage.steps[step]
                ended = lineage.ended.items()
                lineage.ended = {ordinal: end for ordinal, end in ended if end.step <= record.resumed_from}
            case StepRecord():
                assert record.step not in lineage.steps, f"step {record.step} was applied twice"
                lineage.steps[record.step] = record.ordinals
            case EndRecord():
                lineage.ended[record.ordinal] = record
            case GroupRecord():
                lineage.groups.setdefault(record.group.ordinal, []).append(record)
    assert [damage for damage in report.damages if damage.kind == "damaged"] == []
    return lineage


def check_whole_lineage(lineage: Lineage, ledger: dict[str, Any], *, steps: int) -> None:
    """I3: every ordinal up to the cursor was trained once, or ended in another way, or is still under way.

    Args:
        lineage: what the journal says.
        ledger: the snapshot in the checkpoint of the last step.
        steps: how many were trained.
    """
    under_way = {ordinal for ordinal, *_ in ledger["entries"]}
    assert sorted(lineage.steps) == list(range(1, steps + 1))
    trained = lineage.trained
    assert len(trained) == len(set(trained)), "an ordinal was trained twice in the lineage"
    assert not set(trained) & under_way
    others = set(range(ledger["cursor"])) - set(trained) - under_way
    assert others <= set(lineage.ended), "an ordinal was lost"
    ends = dict(ledger["ends"])
    assert ends.pop("trained") == len(trained)
    assert sum(ends.values()) == len(others)
    assert all(ordinal in lineage.groups for ordinal in trained), "trained, but never on disk (I7)"
