"""Runs that were, to be trained again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from learner.config import LearnerConfig
from tests.replays import LiveRun

FAR = {"learning_rate": 3e-3, "max_grad_norm": 1e9, "beta": 0.0}
"""Steps so large that other gradients give other bits."""


@pytest.fixture
def make(tiny_model_dir: Path, tmp_path: Path) -> Callable[..., LiveRun]:
    def make_run(name: str = "run", *, published: bool = True, **options: Any) -> LiveRun:
        base = {
            "model": str(tiny_model_dir), "dataset": "none.jsonl", "output_dir": tmp_path, "run_name": name,
            "num_generations": 4, "max_completion_length": 8, "max_prompt_length": 8, "prompts_per_step": 3,
        }  # fmt: skip
        return LiveRun(LearnerConfig(**{**base, **FAR, **options}), published=published)

    return make_run
