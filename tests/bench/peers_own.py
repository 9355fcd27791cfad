"""Our side of peers.py: the shipped trainer, as `headway-learner` makes it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.meter import Meter
from tests.bench.peers_groups import Shape, make_step, write_model

if TYPE_CHECKING:
    from learner.trainer import Trainer


def make_trainer(shape: Shape, **options: Any) -> Trainer:
    from learner.config import LearnerConfig
    from learner.model.host_memory import keep_freed_memory
    from learner.trainer import Trainer

    keep_freed_memory()  # as learner/compute.py does
    with tempfile.TemporaryDirectory() as directory:
        return Trainer(LearnerConfig(model=str(write_model(Path(directory), shape)), **options))


def step_figures(shape: Shape, *, quick: bool, **options: Any) -> dict[str, float]:
    """Figures (see Meter) of a whole optimizer step, after one of full size to warm up."""
    trainer, batch = make_trainer(shape, **options), make_step(shape, quick=quick)
    meter = Meter()
    for _ in range(2):
        result = trainer.forward_backward(batch)
        assert result.finite
        trainer.optimizer_step()
        meter.lap()
    num_tokens = sum(shape.lengths(quick=quick))
    assert result.loss_tokens == num_tokens
    return meter.figures(num_tokens)
