from __future__ import annotations

import math
import struct
from pathlib import Path

import numpy as np
import pytest

from learner.reward_curve import plot_reward_curve, running_mean
from learner.stats import EvalPoint
from learner.trackers import JsonlTracker


def write_metrics(directory: Path, rewards: list[float]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tracker = JsonlTracker(directory / "metrics.jsonl")
    for step, reward in enumerate(rewards, start=1):
        tracker.log(
            {
                "step": step,
                "skipped": int(step == 2),
                "reward": reward,
                "staleness/token_mean": math.nan if math.isnan(reward) else 1.5,
                "staleness/max": 2,
                "wall_s": 2.0 * step,
            }
        )
    return directory / "metrics.jsonl"


def size_of_png(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    assert data.endswith(b"IEND\xaeB`\x82")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def test_the_running_mean_looks_back_over_finite_values():
    values = np.array([1.0, 3.0, math.nan, 5.0, 7.0])
    assert running_mean(values, 2).tolist() == [1.0, 2.0, 3.0, 5.0, 6.0]


def test_the_running_mean_of_nothing_is_no_value():
    assert running_mean(np.zeros(0), 3).size == 0
    assert np.isnan(running_mean(np.array([math.nan, 1.0]), 3)).tolist() == [True, False]


@pytest.mark.parametrize("name", ["addition", "$x^{$ [bold] \x1b 网络"])
def test_the_picture_of_a_run_whatever_its_name(tmp_path, name):
    metrics = write_metrics(tmp_path / name, [0.3, 0.2, 0.4, math.nan, 0.5])
    evals = [EvalPoint(step=s, reward=0.1 * s, oldest=s, newest=s) for s in range(6)]
    plot_reward_curve(metrics, tmp_path / "reward.png", evals, max_staleness=2)
    assert size_of_png(tmp_path / "reward.png") == (1350, 840)


@pytest.mark.parametrize("rewards", [[], [0.5], [math.nan]])
def test_hardly_a_run_is_still_a_picture(tmp_path, rewards):
    metrics = write_metrics(tmp_path, rewards)
    plot_reward_curve(
        metrics, tmp_path / "reward.png", [EvalPoint(step=0, reward=0.2, oldest=0, newest=0)], max_staleness=0
    )
    assert size_of_png(tmp_path / "reward.png") == (1350, 840)


def test_a_run_that_never_started_is_still_a_picture(tmp_path):
    plot_reward_curve(tmp_path / "metrics.jsonl", tmp_path / "reward.png", [], max_staleness=4)
    assert size_of_png(tmp_path / "reward.png") == (1350, 840)
