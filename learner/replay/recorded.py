"""A run directory as a replay sees it: what it trained, and what it recorded of that. Only reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from learner.checkpoint import (
    STATE,
    UNREADABLE,
    CheckpointState,
    Manifest,
    read_manifest,
    read_state,
    verify_checkpoint,
)
from learner.config import LearnerConfig
from learner.journal_records import Numerics
from learner.replay.compare import Outcome
from learner.replay.index import JournalIndex, index_journal
from learner.trackers import JsonlTracker
from learner.weights_archive.archive import VERSIONS, PublishedRow, read_rows
from protocol.errors import ConfigError
from protocol.versions import Version

UNCOMPARED = frozenset({STATE})
"""Of a checkpoint: not what was trained."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint of the run's last weights."""

    path: Path
    manifest: Manifest
    state: CheckpointState

    @property
    def files(self) -> dict[str, str]:
        """Digests of what the trainer wrote."""
        return {name: entry.blake3 for name, entry in self.manifest.files.items() if name not in UNCOMPARED}


@dataclass
class RecordedRun:
    """A run that was, or is going on.

    Raises:
        ConfigError: not a run directory.
        JournalError: its journal is of another version.
    """

    path: Path
    index: JournalIndex = field(init=False)
    checkpoints: dict[int, Saved] = field(init=False)
    """Of the lineage, by policy_version."""
    refused: list[str] = field(init=False, default_factory=list)
    """Checkpoints that were passed over: which, and why."""
    _configs: dict[int, LearnerConfig] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Read everything but the groups."""
        if not (self.path / "config.json").is_file() or not (self.path / "journal").is_dir():
            raise ConfigError(f"{self.path} is no run directory: name the one under output_dir with config.json in it")
        found = self._readable()
        newest = max(found, key=lambda saved: (saved.manifest.incarnation, saved.manifest.policy_version), default=None)
        known = (newest.state.forks, newest.state.incarnations) if newest is not None else ()
        self.index = index_journal(self.path / "journal", *known)
        self.checkpoints = {
            saved.manifest.policy_version: saved
            for saved in found
            if Version(saved.manifest.incarnation, saved.manifest.policy_version) in self.index.lineage
        }

    @property
    def last(self) -> int:
        """The newest step that the journal or a checkpoint knows."""
        return max([0, *self.index.steps, *self.checkpoints])

    def incarnation_of(self, step: int) -> int:
        """Which learner trained it."""
        return self.index.steps[step].record.incarnation

    def config_of(self, incarnation: int) -> LearnerConfig:
        """The configuration of a learner of the run; that of the last one where the journal does not tell."""
        if incarnation in self._configs:
            return self._configs[incarnation]
        record = self.index.incarnations.get(incarnation)
        text = record.config if record is not None and record.config else (self.path / "config.json").read_text()
        try:
            config = LearnerConfig.model_validate_json(text)
        except ValueError as error:
            raise ConfigError(f"{self.path}: its configuration is not one of this headway: {error}") from error
        return self._configs.setdefault(incarnation, config)

    def numerics_of(self, incarnation: int) -> Numerics | None:
        """What a learner computed with; None where the journal does not tell."""
        record = self.index.incarnations.get(incarnation)
        return None if record is None else record.numerics

    def trained_as(self, step: int, numerics: Numerics, config: LearnerConfig) -> bool:
        """Whether each learner of the lineage that trained the step, first or again, gave it the bits it has here.

        Args:
            step: that the journal has.
            numerics: what it is trained with here.
            config: what it is trained under here; of what may change between two learners, only how a step is cut into
                micro-batches matters.
        """
        records = [self.index.incarnations.get(number) for number, _ in self.index.lineage.forks]
        learners = {self.incarnation_of(step)} | {
            record.incarnation
            for record in records
            if record is not None and record.resumed_from - record.replayed < step <= record.resumed_from
        }
        return all(
            self.numerics_of(number) == numerics and _cut(self.config_of(number)) == _cut(config) for number in learners
        )

    def start_for(self, target: int, start: int | None = None) -> int:
        """Choose where to begin: the newest checkpoint before the target, or the initial weights, or what was asked.

        Raises:
            ConfigError: from there the journal has not every step up to the target (names the steps that would do), or
                the checkpoint that was asked for is damaged. Others that are go to `refused`.
        """
        if start is not None and start != 0 and start not in self.checkpoints:
            raise ConfigError(f"start {start}: there is no checkpoint of that step; {self.reach()}")
        starts = [start] if start is not None else sorted({0, *self.checkpoints}, reverse=True)
        for candidate in starts:
            if not candidate < target <= self.index.last_after(candidate):
                continue
            if self.intact(candidate):
                return candidate
            if start is not None:
                raise ConfigError(f"start {start}: {self.refused[-1]}")
        raise ConfigError(f"{self.path}: step {target} cannot be trained again; {self.reach()}")

    def intact(self, step: int) -> bool:
        """Whether every byte of the checkpoint of a step is right; of one that is not, `refused` says so."""
        if step == 0:
            return True
        path = self.checkpoints[step].path
        try:
            verify_checkpoint(path)
        except UNREADABLE as error:
            self.refused.append(f"checkpoint {path.name} passed over: {error}")
            return False
        return True

    def reach(self) -> str:
        """Say what can be replayed."""
        ways = [
            f"from {start} ({self.checkpoints[start].path.name if start else 'the initial weights'}) up to {last}"
            for start in sorted({0, *self.checkpoints})
            if (last := self.index.last_after(start)) > start
        ]
        return f"its journal leads {'; '.join(ways)}" if ways else "its journal holds no whole step after a checkpoint"

    def outcome(self, step: int) -> Outcome:
        """What the run recorded of a step."""
        record = self.index.steps[step].record
        saved = self.checkpoints.get(step)
        return Outcome(
            learning_rate=record.learning_rate,
            num_micro_batches=record.num_micro_batches,
            metrics=self._rows.get(step, {}),
            weights=self._digests.get(step, ""),
            files=saved.files if saved is not None and saved.manifest.incarnation == record.incarnation else {},
        )

    def _readable(self) -> list[Saved]:
        """Every checkpoint in place; whether its tensors are right is looked at where a replay begins."""
        found = []
        for path in sorted((self.path / "checkpoints").glob("step-*")):
            if not re.fullmatch(r"step-\d{6,}", path.name):
                continue
            try:
                found.append(Saved(path, read_manifest(path), read_state(path)))
            except UNREADABLE as error:
                self.refused.append(f"checkpoint {path.name} passed over: {error}")
        return found

    @cached_property
    def _rows(self) -> Mapping[int, dict[str, Any]]:
        rows = JsonlTracker(self.path / "metrics.jsonl").rows()
        return {int(row["step"]): row for row in rows if not row["skipped"]}  # type: ignore[arg-type]

    @cached_property
    def _digests(self) -> dict[int, str]:
        """By step; of one that the next learner published, too, its own: both sides of a fork have the same bytes."""
        digests: dict[int, str] = {}
        if (self.path / "weights" / VERSIONS).is_file():
            for row in read_rows(self.path / "weights"):
                if isinstance(row, PublishedRow) and row.version in self.index.lineage:
                    digests.setdefault(row.version.policy_version, row.digest)
        return digests


def _cut(config: LearnerConfig) -> tuple[int, bool, int]:
    return config.token_budget, config.share_prefix, config.context_parallel_size
