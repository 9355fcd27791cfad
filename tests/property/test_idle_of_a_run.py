"""Idle time in a whole run on a virtual clock: what causes sum to is what each side measures by itself."""

from __future__ import annotations

import json
import math

import pytest

from learner.idle import EMPTY_SEATS, LearnerWaits
from tests.simulation import Plan, simulate


@pytest.mark.parametrize(
    ("servers", "options", "expected"),
    [
        (3, {"max_staleness": 0}, LearnerWaits.BOUND),
        (1, {"max_staleness": 4, "prompts_per_step": 12}, LearnerWaits.ROLLOUTS),
    ],
    ids=["synchronous", "one small server"],
)
def test_causes_sum_to_what_each_side_measures(servers, options, expected, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    monkeypatch.setattr("os.fdatasync", lambda descriptor: None)
    simulation = simulate(Plan(seed=3, servers=servers, max_steps=12, options=options), tmp_path)
    rows = [json.loads(line) for line in (simulation.config.run_dir / "metrics.jsonl").read_text().splitlines()]
    idle = dict.fromkeys(LearnerWaits, 0.0)
    num_observed = 0
    for row in rows[1:]:  # the first wait began before the first lease
        waited_s = row["perf/rollout_wait_s"] + row["perf/weight_sync_s"]
        assert math.isclose(sum(row[f"learner/idle_{cause}_s"] for cause in LearnerWaits), waited_s, abs_tol=1e-6)
        empty_s = sum(row[column] for column in EMPTY_SEATS)
        if row["rollout/observed_s"]:
            num_observed += 1
            occupied_s = row["rollout/occupancy"] * row["rollout/observed_s"]
            assert math.isclose(empty_s + occupied_s, row["rollout/observed_s"], rel_tol=1e-6)
        for cause in LearnerWaits:
            idle[cause] += row[f"learner/idle_{cause}_s"]
    assert idle[expected] > 0.5 * sum(idle.values()), idle
    assert num_observed > len(rows) / 2, "servers say how they do once a second, and behind every group"
