"""The comparison of PPO with GRPO: sides that differ in nothing else, and figures read and shown as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from learner.config import LearnerConfig
from learner.demo import ppo_vs_grpo as bench
from learner.demo.ppo_vs_grpo import Figures, PpoVsGrpoOptions, describe, read_figures
from protocol.errors import RunStopped
from protocol.settings import load_settings

GRPO: dict[str, Any] = {
    "parameters": {"policy": 1_000_000}, "peak_bytes": 100 << 20, "learner_cpu_s": 0.25, "step_s": 0.5,
    "reward_first": 0.3, "reward_last": 0.7, "eval_first": 0.25, "eval_last": 0.75,
}  # fmt: skip
PPO = GRPO | {"parameters": {"policy": 1_000_000, "critic": 900_000}, "peak_bytes": 120 << 20, "learner_cpu_s": 0.5}


def test_defaults() -> None:
    full, quick = PpoVsGrpoOptions(), PpoVsGrpoOptions(quick=True)
    assert (full.steps, list(full.seeds)) == (120, [0, 1])
    assert (quick.steps, list(quick.seeds)) == (6, [0])
    given = PpoVsGrpoOptions(quick=True, max_steps=3, num_seeds=2)
    assert (given.steps, list(given.seeds)) == (3, [0, 1])


def test_sides_differ_in_the_objective_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_pair", lambda *commands, **logs: 0)
    monkeypatch.setattr(bench, "read_figures", lambda run_dir: run_dir)
    configs = []
    for side in bench.SIDES:
        run_dir = bench._run_side(side, 1, 7, model=tmp_path, run_dir=tmp_path / side)
        configs.append(load_settings(LearnerConfig, ["--config", str(run_dir / "learner.toml")], prog="l").model_dump())
    grpo, ppo = configs
    own = {"advantage_estimator", "value_learning_rate"}
    where = {"bind", "dataset", "eval_dataset", "run_name"}
    assert {key for key in grpo if grpo[key] != ppo[key]} == own | where
    assert (grpo["max_steps"], grpo["seed"], grpo["max_staleness"], grpo["filter_zero_std"]) == (7, 1, 0, False)
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "grpo" / "data" / name).read_bytes() == (tmp_path / "ppo" / "data" / name).read_bytes()


def test_a_run_that_fails_names_its_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_pair", lambda *commands, **logs: 3)
    with pytest.raises(RunStopped, match=rf"^ppo with seed 0 ended with exit code 3: read {tmp_path}/r/logs$"):
        bench._run_side("ppo", 0, 1, model=tmp_path, run_dir=tmp_path / "r")


def test_figures_of_a_run(tmp_path: Path) -> None:
    rows = [{"reward": i / 10, "step_time": float(10 - i)} for i in range(10)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "summary.json").write_text(json.dumps({"eval_first": 0.1, "eval_last": 0.9, "other": None}))
    meter = {"parameters": {"policy": 5}, "peak_bytes": None, "cpu_s": [9.0, 1.0, 2.0]}
    (tmp_path / "meter.json").write_text(json.dumps(meter))
    assert read_figures(tmp_path) == Figures(
        parameters={"policy": 5}, peak_bytes=None, learner_cpu_s=2.0, step_s=5.5, reward_first=pytest.approx(0.1),
        reward_last=pytest.approx(0.8), eval_first=0.1, eval_last=0.9,
    )  # fmt: skip


def test_the_table() -> None:
    figures = {"grpo": [Figures(**GRPO), Figures(**GRPO | {"learner_cpu_s": 0.35})], "ppo": [Figures(**PPO)] * 2}
    assert describe(figures, steps=120).splitlines() == [
        "                                   grpo           ppo                 ppo / grpo",
        "models held by the learner         1: policy      2: policy, critic",
        "parameters, million                1.00  1.00     1.90  1.90          1.90",
        "weights, gradients, moments, MiB   15.3  15.3     29.0  29.0          1.90",
        "peak memory over base, MiB         100.0  100.0   120.0  120.0        1.20",
        "learner's step, CPU s              0.250  0.350   0.500  0.500        1.67",
        "step with sampling, wall s         0.500  0.500   0.500  0.500        1.00",
        "reward, first 20 steps             0.300  0.300   0.300  0.300",
        "reward, last 20 steps              0.700  0.700   0.700  0.700",
        "evaluation before                  0.250  0.250   0.250  0.250",
        "evaluation after                   0.750  0.750   0.750  0.750",
    ]


def test_memory_that_the_system_does_not_tell_is_unknown() -> None:
    figures = {side: [Figures(**GRPO | {"peak_bytes": None})] for side in ("grpo", "ppo")}
    (line,) = [line for line in describe(figures, steps=6).splitlines() if line.startswith("peak memory")]
    assert line.split()[-2:] == ["unknown", "unknown"]
