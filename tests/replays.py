"""A run directory as a learner leaves it, made without servers: a real trainer, a real journal, real checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.batch import Batch
from learner.checkpoint import CheckpointState, save_checkpoint
from learner.config import LearnerConfig
from learner.journal_records import GroupRecord, IncarnationRecord, Record, StepRecord, record_frames
from learner.journal_segments import read_journal
from learner.journal_writer import SegmentWriter
from learner.ledger import Ledger
from learner.replay.command import replay
from learner.replay.resume import Replayed, train_again
from learner.replay.trained_again import weights_digest
from learner.trackers import JsonlTracker
from learner.trainer import Trainer
from learner.weights_archive.archive import PublishedRow
from protocol.versions import Version
from tests.factories import make_train_group

GROUPS = 3
NO = float("nan")
STEPS_T = np.array([NO, 0.5, 1.0, NO, 0.0, NO, 0.25, -0.5, NO, 1.0, NO, NO, 0.0, NO], np.float32)


def batch_of(step: int, incarnation: int = 1) -> Batch:
    """Groups that say which step they are of, sampled by the weights before it."""
    groups = [
        make_train_group(
            ordinal=GROUPS * (step - 1) + i, lengths=[3, 6, 1, 4], prompt_tokens=[5, 6 + i, 7][: 2 + i % 2],
            version=Version(incarnation, step - 1), step_rewards=STEPS_T * (i + 1),
        )
        for i in range(GROUPS)
    ]  # fmt: skip
    return Batch(step=step, groups=tuple(reversed(groups)))


class LiveRun:
    """A learner that trains, and records as the shipped one does."""

    def __init__(self, config: LearnerConfig, *, published: bool = True) -> None:
        self.config, self.path, self.published = config, config.run_dir, published
        for place in ("journal", "checkpoints", "weights", "samples", "logs"):
            (self.path / place).mkdir(parents=True, exist_ok=True)
        self.incarnation, self.forks = 0, list[tuple[int, int]]()
        self.incarnations: tuple[IncarnationRecord, ...] = ()
        self.tracker = JsonlTracker(self.path / "metrics.jsonl")

    def begin(
        self, checkpoint: Path | None = None, config: LearnerConfig | None = None, *, trainer: Trainer | None = None,
        **fields: Any,
    ) -> None:  # fmt: skip
        """Start a learner, with another configuration perhaps."""
        self.config = config or self.config
        (self.path / "config.json").write_text(self.config.model_dump_json())
        self.trainer = trainer or Trainer(self.config, checkpoint=checkpoint)
        self.incarnation += 1
        first = self.trainer.policy_version
        self.forks = [fork for fork in self.forks if fork[1] <= first] + [(self.incarnation, first)]
        self.tracker.truncate_after(first)
        beginning = IncarnationRecord(
            incarnation=self.incarnation, resumed_from=first, config=self.config.model_dump_json(),
            **{"numerics": self.trainer.numerics, **fields},
        )  # fmt: skip
        self.incarnations = (*self.incarnations, beginning)
        self.write(beginning)

    def begin_by_replay(self, checkpoint: Path, config: LearnerConfig | None = None) -> Replayed:
        """Start a learner that trains the steps after the checkpoint again."""
        self.config = config or self.config
        trainer = Trainer(self.config, checkpoint=checkpoint)
        replayed = train_again(trainer, self.config)
        self.begin(trainer=trainer, replayed=replayed.steps)
        return replayed

    def write(self, *records: Record) -> None:
        """Append to the journal."""
        writer = SegmentWriter(self.path / "journal", segment_bytes=1 << 14)
        writer.write([(record, record_frames(record)) for record in records])
        writer.close()

    def train(self, *steps: int, sampled_by: int = 0) -> None:
        """Journal groups and steps, and train them."""
        for step in steps:
            batch = batch_of(step, sampled_by or self.incarnation)
            records: list[Record] = [
                GroupRecord(incarnation=self.incarnation, prompt="", prompt_tokens=g.prompt_tokens, group=g.group)
                for g in sorted(batch.groups, key=lambda group: group.ordinal)
            ]
            result, rate = self.trainer.forward_backward(batch), self.trainer.learning_rate
            assert result.finite
            self.write(
                *records,
                StepRecord(
                    incarnation=self.incarnation, step=step, ordinals=tuple(g.ordinal for g in batch.groups),
                    learning_rate=rate, num_micro_batches=int(result.metrics["num_micro_batches"]),
                ),
            )  # fmt: skip
            self.trainer.optimizer_step()
            others = {"wall_s": time.monotonic(), "staleness/hist": [step]}  # never those of another run
            row = {"step": step, "skipped": 0, "learning_rate": rate, **others, **self.trainer.step_metrics}
            self.tracker.log(row)
            if self.published:
                self._publish(step)

    def save(self) -> Path:
        """Write a checkpoint."""
        state = CheckpointState(
            run_id="run", incarnation=self.incarnation, forks=tuple(self.forks),
            policy_version=self.trainer.policy_version, config_fingerprint="",
            ledger=Ledger(self.config.granted_bounds).snapshot(), incarnations=self.incarnations,
        )  # fmt: skip
        return save_checkpoint(self.path / "checkpoints", self.trainer.policy_version, self.trainer.save, state, keep=9)

    @property
    def digest(self) -> str:
        """Of the weights now."""
        return weights_digest(self.trainer, "xxh3_128")

    def _publish(self, step: int) -> None:
        row = PublishedRow(
            version=Version(self.incarnation, step), bytes=0, density=None, delta_bytes=None, snapshot_s=0, hash_s=0,
            delta_s=0, digest=self.digest,
        )  # fmt: skip
        with (self.path / "weights" / "versions.jsonl").open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")


def rewrite(run_dir: Path, change: Any) -> None:
    """Pass every record of a journal through `change`; what becomes None is left out."""
    journal = run_dir / "journal"
    changed = map(change, read_journal(journal))
    records: Sequence[Record] = [record for record in changed if record is not None]
    for path in journal.iterdir():
        path.unlink()
    writer = SegmentWriter(journal, segment_bytes=1 << 14)
    writer.write([(record, record_frames(record)) for record in records])
    writer.close()


def with_other_reward(ordinal: int) -> Any:
    """Change one reward of one group."""

    def change(record: Record) -> Record:
        if not isinstance(record, GroupRecord) or record.group.ordinal != ordinal:
            return record
        rewards = record.group.rewards.copy()
        rewards[1] += 0.5
        return msgspec.structs.replace(record, group=msgspec.structs.replace(record.group, rewards=rewards))

    return change


def run_replay(run: LiveRun, *flags: str) -> int:
    """Run the command on it."""
    return replay([str(run.path), *flags], prog="headway-learner replay")
