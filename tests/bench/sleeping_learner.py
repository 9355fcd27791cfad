"""A learner whose training takes time but no work: `python -m tests.bench.sleeping_learner STEP_S TOKEN_S --config F`.

Everything is the shipped learner; `forward_backward` alone sleeps, STEP_S a batch and TOKEN_S for each of its tokens,
and leaves gradients of zero behind. The model is a tiny random one, made here: a process that only starts others need
not load torch.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from learner.app import run
from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.trainer import Trainer
from protocol.command import run_command
from protocol.settings import load_settings
from tests.models import build_tiny_model

PROG = "sleeping-learner"


def make_sleeping(step_s: float, token_s: float) -> Callable[..., Trainer]:
    """Return a Trainer whose forward and backward pass takes so many seconds a batch, and so many more a token."""

    class SleepingTrainer(Trainer):
        def forward_backward(self, batch: Batch) -> StepResult:
            tokens = sum(train.group.completion_tokens.size for train in batch.groups)
            time.sleep(step_s + token_s * tokens)
            for parameter in self._parameters.values():
                parameter.grad = torch.zeros_like(parameter)
            self._gradient_norm = torch.ones(())
            return StepResult(finite=True, loss_tokens=tokens)

    return SleepingTrainer


def main() -> int:
    step_s, token_s, *argv = sys.argv[1:]
    config = load_settings(LearnerConfig, argv, prog=PROG)
    build_tiny_model(Path(config.model))
    return run(config, make_sleeping(float(step_s), float(token_s)))


if __name__ == "__main__":
    sys.exit(run_command(PROG, main))
