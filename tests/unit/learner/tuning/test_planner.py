"""Which setting is named, and which side is said to be the slower one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from learner.__main__ import dispatch
from learner.tuning.planner import NEARLY, plan, read_vary
from learner.tuning.trace import lognormal_trace
from learner.tuning.workload import Costs, Dial, Workload
from protocol.errors import ConfigError

FLAGS = [
    "--prompts-per-step", "4", "--num-generations", "4", "--room", "8", "--length-median", "40",
    "--length-p99-over-p50", "8", "--max-completion-length", "300", "--steps", "25", "--warmup-steps", "8",
]  # fmt: skip
DIAL = Dial(prompts_per_step=4, num_generations=4, max_staleness=2)


def workload(*, train: float = 1.0) -> Workload:
    """One server of 8 seats; training takes `train` times as long as generation at full seats."""
    trace = lognormal_trace(
        num_groups=400, num_generations=4, median=40, p99_over_p50=8, max_completion_length=300, seed=1
    )
    return Workload(
        trace=trace, room=8, costs=Costs(decode_token_s=0.01, occupancy_cost=1.0, train_token_s=train * 0.02 / 8)
    )


def test_the_knee_is_the_least_stale_that_trains_nearly_as_much_as_the_best():
    found = plan(workload(), DIAL, read_vary(["max_staleness=0,1,2,4,8,16"]), steps=25, warmup_steps=8)
    rates = {one.dial.max_staleness: one.forecast.trained_tokens_s for one in found.candidates}
    most = max(rates.values())
    assert found.best.forecast.trained_tokens_s == most
    assert found.knee.dial.max_staleness == min(m for m, rate in rates.items() if rate >= NEARLY * most)
    assert 0 < found.knee.dial.max_staleness < 16, "running ahead pays here, and not for ever"


@pytest.mark.parametrize(
    ("train", "slower", "more"), [(0.5, "rollouts", "1.0 more servers"), (3.0, "training", "2.0 more trainers")]
)
def test_the_slower_side_is_named_and_by_how_much_it_is_slower(train, slower, more):
    found = plan(workload(train=train), DIAL, read_vary(["max_staleness=2"]), steps=40, warmup_steps=8)
    assert found.advice.startswith(f"{slower}")
    assert more in found.advice


def test_doing_what_is_advised_balances_the_sides():
    found = plan(workload(train=3.0), DIAL, read_vary(["split=1:1,3:1"]), steps=40, warmup_steps=8)
    before, after = found.candidates
    assert after.forecast.step_s < before.forecast.step_s / 2
    assert "equally fast" in plan(workload(train=3.0), DIAL, {"split": ["3:1"]}, steps=40, warmup_steps=8).advice


def test_what_cannot_progress_is_shown_as_refused_and_the_rest_is_planned():
    found = plan(workload(), DIAL, read_vary(["max_staleness=0,2", "weight_sync_steps=1,3"]), steps=10, warmup_steps=4)
    assert found.candidates[0].name == "max_staleness 0, weight_sync_steps 1"
    assert len(found.refused) == 1
    assert "max_staleness 0, weight_sync_steps 3: " in found.refused[0]
    assert "deadlock" in found.refused[0]
    with pytest.raises(ConfigError, match=r"no setting in question can progress: .*deadlock"):
        plan(workload(), DIAL, read_vary(["weight_sync_steps=5"]), steps=10, warmup_steps=4)


@pytest.mark.parametrize(
    ("vary", "complaint"),
    [
        ("temperature=1", "'temperature' cannot vary; allowed are max_staleness"),
        ("max_staleness=1,x", "'x' is no value of max_staleness; write max_staleness=1,2,4"),
        ("max_staleness=", "'' is no value"),
        ("split=1", "'1' is no value of split; write split=1:1,1:2"),
        ("split=0:1", "at least one trainer and one server"),
        ("max_staleness=" + ",".join(map(str, range(257))), "257 settings in all, and 256 are the most"),
    ],
)
def test_what_cannot_vary_is_refused(vary, complaint):
    with pytest.raises(ConfigError, match=complaint):
        read_vary([vary])


@pytest.mark.parametrize("flags", [["--compare"], ["--write-trace", "lengths"]])
def test_flags_of_simulate_alone_are_unknown_here(flags):
    with pytest.raises(ConfigError, match="unknown flag --"):
        dispatch(["tune", *FLAGS, *flags])


def test_the_command_prints_a_table_with_its_knee_or_json_and_draws(tmp_path: Path, capsys):
    drawn = tmp_path / "tune.png"
    assert dispatch(["tune", *FLAGS, "--vary", "max_staleness=0,2", "--plot", str(drawn)]) == 0
    shown = capsys.readouterr().out
    assert "max_staleness 0 " in shown
    assert shown.count("<- knee") == 1
    assert "knee: max_staleness 2." in shown
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert dispatch(["tune", *FLAGS, "--vary", "max_staleness=0,2", "--as-json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["knee"] == "max_staleness 2"
    assert [one["max_staleness"] for one in found["candidates"]] == ["0", "2"]
