"""Training the steps of a recorded run again, one after another, on this machine's CPU (or another device).

Each step is trained as the learner did: the same groups in the same order, under the configuration of the learner that
trained it. Where the next learner had another configuration, the state goes through a checkpoint, as it did then.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import blake3
import torch

from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.replay.compare import Outcome
from learner.replay.index import batches
from learner.replay.recorded import RecordedRun
from learner.trainer import Trainer
from learner.weights_archive.archive import version_digest
from protocol.errors import ConfigError
from protocol.weights.manifest import Algorithm


@dataclass(frozen=True, slots=True)
class TrainedStep:
    """A step that was trained again."""

    batch: Batch
    outcome: Outcome


class Replay:
    """A trainer on its way through the steps of a run.

    Args:
        run: what is trained again.
        start: policy_version to begin with: a checkpoint of the run, or 0.
        device: cpu for the same bits.

    Raises:
        ConfigError: the model or the checkpoint cannot be loaded.
    """

    def __init__(self, run: RecordedRun, start: int, *, device: str = "cpu") -> None:
        self.run, self.start, self._device = run, start, device
        first = run.incarnation_of(start + 1)
        numerics = run.numerics_of(first)
        if numerics is not None:
            torch.set_num_threads(numerics.num_threads)  # how a sum is cut decides its rounding
        checkpoint = run.checkpoints[start].path if start else None
        self._config = self._config_of(first)
        self.trainer = Trainer(self._config, checkpoint=checkpoint)

    @property
    def exact(self) -> bool:
        """Whether the bits have to be those of the run."""
        here, run = self.trainer.numerics, self.run
        steps = [step for step in run.index.steps if step > self.start]
        return here.device == "cpu" and all(
            run.trained_as(step, here, run.config_of(run.incarnation_of(step))) for step in steps
        )

    def train(self, target: int) -> Iterator[TrainedStep]:
        """Train up to the target; yield each step when its weights are there."""
        steps = [self.run.index.steps[step] for step in range(self.start + 1, target + 1)]
        incarnations = [steps[0].record.incarnation, *(step.record.incarnation for step in steps)]
        for batch, (before, now) in zip(batches(self.run.path / "journal", steps), pairwise(incarnations), strict=True):
            if now != before:
                self._continue_as(now)
            yield TrainedStep(batch, self._train(batch))

    def save(self, directory: Path) -> dict[str, str]:
        """Write what a checkpoint holds of the trainer; return the digests of its files."""
        self.trainer.save(directory)
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {path.relative_to(directory).as_posix(): _digest(path) for path in files}

    def _train(self, batch: Batch) -> Outcome:
        recorded = self.run.outcome(batch.step)
        outcome, _ = train_step(self.trainer, batch, recorded, digest=True)
        if recorded.files:
            with tempfile.TemporaryDirectory() as directory:
                outcome = replace(outcome, files=self.save(Path(directory)))
        return outcome

    def _continue_as(self, incarnation: int) -> None:
        """Be the next learner of the run."""
        config = self._config_of(incarnation)
        if config == self._config:
            return
        with tempfile.TemporaryDirectory() as directory:
            self.trainer.save(Path(directory))
            self._config, self.trainer = config, Trainer(config, checkpoint=Path(directory))

    def _config_of(self, incarnation: int) -> LearnerConfig:
        config = self.run.config_of(incarnation)
        return config.model_copy(update={"device": self._device})


def train_step(trainer: Trainer, batch: Batch, recorded: Outcome, *, digest: bool) -> tuple[Outcome, StepResult]:
    """Train one step as it was recorded, and say what came of it.

    Args:
        trainer: has trained the step before.
        batch: of the step.
        recorded: what the run recorded of it.
        digest: whether to hash the weights, which takes as long as reading all of them.

    Raises:
        ConfigError: it has no finite gradient here.
    """
    trainer.fixed_learning_rate = recorded.learning_rate
    result = trainer.forward_backward(batch)
    if not result.finite:
        raise ConfigError(f"step {batch.step} cannot be trained here: {result.reason}; the run did train it")
    trainer.optimizer_step()
    trainer.fixed_learning_rate = None
    algorithm = recorded.weights.partition(":")[0]
    outcome = Outcome(
        learning_rate=recorded.learning_rate,
        num_micro_batches=int(result.metrics["num_micro_batches"]),
        metrics=trainer.step_metrics,
        weights=weights_digest(trainer, "blake3" if algorithm == "blake3" else "xxh3_128") if digest else "",
    )
    return outcome, replace(result, metrics=trainer.step_metrics)


class _InMemory:
    """Where a version is written to be hashed: room for as many tensors at once as threads write."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes

    def view(self, name: str) -> memoryview:
        """Room for a tensor's bytes."""
        return memoryview(bytearray(self._sizes[name]))


def weights_digest(trainer: Trainer, algorithm: Algorithm) -> str:
    """Digest the weights as they would be published."""
    sizes = {spec.name: spec.nbytes for spec in trainer.specs()}
    return version_digest(algorithm, trainer.write_weights(_InMemory(sizes), algorithm))


def _digest(path: Path) -> str:
    return blake3.blake3(path.read_bytes()).hexdigest()
