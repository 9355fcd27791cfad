"""The comparison of PPO with GRPO, run: four processes, two of each side, two steps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from learner.trackers import JsonlTracker


@pytest.mark.system
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides from the same weights: what the first step samples is the same, and PPO holds a second model."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "learner", "bench", "ppo-vs-grpo", "--quick", "--max-steps", "2"]
    paths = ["--output-dir", str(tmp_path / "runs"), "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run([*command, *paths], capture_output=True, text=True, check=False, timeout=110)
    assert done.returncode == 0, done.stderr
    table = {line[:35].strip(): line[35:].split() for line in done.stdout.splitlines()}
    assert table["models held by the learner"] == ["1:", "policy", "2:", "policy,", "critic"]
    assert table["parameters, million"] == ["0.10", "0.20", "1.99"]
    first = table["reward, first 1 steps"]
    assert first[0] == first[1] != "0.000"
    grpo, ppo = (
        JsonlTracker(tmp_path / "runs" / "ppo-vs-grpo-1" / f"{side}-0" / "metrics.jsonl").rows()
        for side in ("grpo", "ppo")
    )
    assert grpo[0]["step_tokens"] == ppo[0]["step_tokens"] > 0
    assert "value_loss" in ppo[0]
    assert "value_loss" not in grpo[0]
