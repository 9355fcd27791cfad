"""A whole learner step by the head that computes the loss, against the head that runs twice: time and peak memory.

Model and lengths: Qwen3, hidden 256, 4 layers, vocabulary 32,768, tied; one group of G completions a step, lognormal
around 100 tokens (sigma 0.7), 16 to 512. Peak is the growth of the resident set over that after loading.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tests.bench.harness import Row
from tests.bench.learner_step import QWEN3, make_groups, timed_step
from tests.bench.memory import peak_mib, reset_peak

GROUPS = {"16x64": (16, 64), "64x512": (64, 512)}
"""Completions, and tokens of the prompt."""


def completion_lengths(num_generations: int) -> list[int]:
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(np.log(100), 0.7, num_generations)
    return np.clip(drawn, 16, 512).astype(int).tolist()


def step(group: str, measure: str, options: dict[str, Any], quick: bool) -> float:
    """CPU seconds of a step after one to warm up, or MiB over what was there before the first."""
    import torch

    from learner.config import LearnerConfig
    from learner.trainer import Trainer
    from tests.models import build_tiny_model

    torch.set_num_threads(1)
    num_generations, prompt_length = GROUPS[group]
    batch = make_groups([completion_lengths(num_generations)], prompt_length, QWEN3["vocab_size"])
    with tempfile.TemporaryDirectory() as directory:
        build_tiny_model(Path(directory), **QWEN3)
        trainer = Trainer(LearnerConfig(model=directory, learning_rate=1e-6, token_budget=1024, **options))
    before_mib = reset_peak()
    seconds = [timed_step(trainer, batch) for _ in range(2 if quick else 3)]
    return min(seconds[1:]) if measure == "time" else peak_mib() - before_mib


def _row(group: str, measure: Literal["time", "peak"], name: str, control: str, target: float, **options: Any) -> Row:
    ours, baseline = partial(step, group, measure, options), partial(step, group, measure, {"loss_head": "recompute"})
    for side in (ours, baseline):
        side.__module__ = __name__  # type: ignore[attr-defined]  # where the harness looks for the row
    return Row(
        name=f"step_{name}_{measure}_{group}",
        control=control,
        ours=ours,
        baseline=baseline,
        ratio="ours/baseline",
        target=target,
        sense="lower",
        unit={"time": "CPU s a step", "peak": "MiB over base"}[measure],
        rounds=1 if measure == "peak" else 5,
    )


ROWS = [
    *(_row(group, "time", "fused_head", "head that runs twice", 1.0, loss_head="fused") for group in GROUPS),
    *(_row(group, "peak", "fused_head", "head that runs twice", 1.05, loss_head="fused") for group in GROUPS),
    _row("64x512", "time", "checkpointed", "activations kept, head twice", 1.4, gradient_checkpointing=True),
    _row("64x512", "peak", "checkpointed", "activations kept, head twice", 0.9, gradient_checkpointing=True),
]
