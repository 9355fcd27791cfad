"""A learner that goes on by `replay`: the steps after its checkpoint are trained again before anything else.

The checkpoint is of step c, the journal knows steps c + 1 .. k: the trainer trains them again, the ledger is told of
them, and the run goes on from k as if it had not been interrupted. Nothing is trained twice in the lineage, and every
group that is on disk keeps its place.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.journal_records import EndRecord, StepRecord
from learner.ledger import End, Ledger
from learner.replay.compare import Difference, difference
from learner.replay.index import JournalIndex, batches
from learner.replay.recorded import RecordedRun
from learner.rundir import config_fingerprint

if TYPE_CHECKING:
    from learner.trainer import Trainer


@dataclass(kw_only=True)
class Replayed:
    """What was trained again."""

    index: JournalIndex
    steps: int = 0
    unrecorded: list[tuple[Batch, StepResult, float]] = field(default_factory=list)
    """Steps (with their learning rates) that the run had not got to write into metrics.jsonl."""
    difference: Difference | None = None
    """The first, from what was recorded."""
    seconds: float = 0.0

    def describe(self, last: int) -> str:
        """Say it in a line."""
        if not self.steps:
            return "resume replay: the journal has no step after the checkpoint that can be trained again"
        what = f"trained steps {last - self.steps + 1} to {last} again from the journal, in {self.seconds:.1f} s"
        return f"{what}; they differ from what was recorded, first in {self.difference}" if self.difference else what


def train_again(trainer: Trainer, config: LearnerConfig) -> Replayed:
    """Train what the journal holds after the trainer's checkpoint. On the compute thread.

    Steps that a learner of another configuration trained are left: they would not be the same.
    """
    from learner.replay.trained_again import train_step

    begun_s, run = time.monotonic(), RecordedRun(config.run_dir)
    replayed = Replayed(index=run.index)
    start = trainer.policy_version
    steps = []
    for step in range(start + 1, min(run.index.last_after(start), config.max_steps) + 1):
        if config_fingerprint(run.config_of(run.incarnation_of(step))) != config_fingerprint(config):
            break
        steps.append(run.index.steps[step])
    exact = trainer.numerics.device == "cpu"
    for batch in batches(run.path / "journal", steps):
        recorded = run.outcome(batch.step)
        exact = exact and run.trained_as(batch.step, trainer.numerics, config)  # other bits are so in all later steps
        outcome, result = train_step(trainer, batch, recorded, digest=exact and bool(recorded.weights))
        found = difference(batch.step, recorded, outcome, exact=exact, names=("then", "now"))
        replayed.difference = replayed.difference or found
        replayed.steps += 1
        if not recorded.metrics:
            replayed.unrecorded.append((batch, result, recorded.learning_rate))
    replayed.seconds = time.monotonic() - begun_s
    return replayed


def tell_ledger(ledger: Ledger, index: JournalIndex, last: int, too_long: Callable[[int], bool]) -> None:
    """Bring a ledger from its checkpoint to step `last`, by what the journal says of prompts that ended meanwhile.

    Prompts are granted in their order, so that each gets the sequence number it had. What will end untrained ends when
    it is granted: its record may be behind that of a step which was formed after its slot was free.

    Args:
        ledger: restored; has granted nothing since.
        index: of the journal.
        last: the step that was trained again last.
        too_long: whether the row of an ordinal is, and never gets a lease.
    """
    steps = [e for e in index.events if isinstance(e, StepRecord) and ledger.policy_version < e.step <= last]
    trained = {ordinal for step in steps for ordinal in step.ordinals}
    ends = {
        e.ordinal: End(e.end)
        for e in index.events
        if isinstance(e, EndRecord) and e.sequence >= 0 and e.step <= last and e.ordinal not in trained
    }
    for entry in list(ledger.entries.values()):
        if entry.ordinal in ends:
            ledger.end(entry.sequence, ends[entry.ordinal])

    def grant_up_to(ordinal: int) -> None:
        """Grant, in order, every prompt up to this one that has no slot yet; what will end untrained ends at once."""
        while ledger.cursor <= ordinal:
            if too_long(ledger.cursor):
                ledger.filter_unleased()
                continue
            granted = ledger.grant()
            if granted.ordinal in ends:
                ledger.end(granted.sequence, ends[granted.ordinal])

    for step in steps:
        grant_up_to(max(step.ordinals))
        sequences = []
        for ordinal in step.ordinals:
            leased = ledger.find(ordinal)
            assert leased is not None, f"group {ordinal} of step {step.step} has ended before"
            ledger.delivered(ordinal, ledger.min_policy_version(leased.sequence))
            sequences.append(leased.sequence)
        ledger.batch(sequences)
        ledger.trained(sequences, step.step)
        ledger.live(step.step)
    grant_up_to(max(ends, default=-1))
