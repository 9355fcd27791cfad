"""A run that is stopped in the middle of a step: the step is applied whole, its row in metrics.jsonl included."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, ClassVar, cast

import pytest

from learner.batch import Batch, StepResult
from learner.compute import Compute
from learner.loops import train_loop
from learner.publish import Publisher
from learner.recorder import Recorder
from protocol.waits import Waits
from tests.learners import answer, make_desk, run


class SlowTrainer:
    """Its optimizer step lasts until told."""

    policy_version = 0
    learning_rate = 0.5
    peak_learning_rate = 0.5
    step_metrics: ClassVar[dict[str, float]] = {"loss": 0.125}

    def __init__(self) -> None:
        self.stepping, self.go_on = threading.Event(), threading.Event()

    def forward_backward(self, batch: Batch) -> StepResult:
        return StepResult(finite=True, loss_tokens=10)

    def optimizer_step(self) -> int:
        self.stepping.set()
        assert self.go_on.wait(5.0)
        self.policy_version, self.learning_rate = 1, 0.25
        return self.policy_version


class Steps:
    """Stands for publisher and recorder."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float]] = []
        self.published: list[int] = []
        self.metrics: list[dict[str, float]] = []

    async def wait_previous(self) -> None: ...

    def start(self, version: Any, canaries: object) -> None:
        self.published.append(version.policy_version)

    def step(self, batch: Batch, result: StepResult, timer: Any, *, learning_rate: float) -> None:
        self.rows.append((batch.step, learning_rate))
        self.metrics.append(result.metrics)


def test_the_step_under_way_is_applied_and_recorded_before_a_run_stops():
    desk, trainer, steps = make_desk(), SlowTrainer(), Steps()
    desk.join("north")
    desk.pump()
    for lease in desk.leases()[:2]:
        desk.receive(answer(lease))
    desk.accept()
    desk.ledger.batch([0, 1])

    async def stopped() -> None:
        compute = Compute()
        batches: asyncio.Queue[Batch] = asyncio.Queue()
        batches.put_nowait(Batch(step=1, groups=desk.buffer.take([0, 1])))
        training = asyncio.create_task(
            train_loop(
                batches, trainer, compute, cast("Publisher", steps), desk.coordinator, desk.journal,
                cast("Recorder", steps), Waits(),
            )
        )  # fmt: skip
        await asyncio.to_thread(trainer.stepping.wait, 5.0)
        training.cancel()
        trainer.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await training
        await compute.close()

    run(stopped())
    assert (desk.ledger.policy_version, steps.published) == (1, [1])
    assert steps.metrics == [{"loss": 0.125}], "those of all its updates, not of the first one alone"
    assert steps.rows == [(1, 0.5)], "with the learning rate of the step, not of the next one"
