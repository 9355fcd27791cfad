"""headway-learner simulate, as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from learner.__main__ import dispatch
from learner.tuning.recorded import fit_line
from protocol.errors import ConfigError
from protocol.length_trace import read_length_trace

SMALL = ["--prompts-per-step", "2", "--num-generations", "4", "--room", "4", "--steps", "6", "--warmup-steps", "2",
         "--length-median", "20", "--max-completion-length", "60"]  # fmt: skip


def ask(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    assert dispatch(["simulate", *SMALL, *flags]) == 0
    return capsys.readouterr().out


def test_the_table_says_what_a_run_would_be_like(capsys: pytest.CaptureFixture[str]):
    lines = ask(capsys, "--compare").splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "step", "over synchronous", "trained", "learner idle", "rollout idle", "staleness", "violations",
        "length ratio", "server share",
    ]  # fmt: skip


def test_json_has_the_same_and_a_written_trace_gives_the_same_again(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    path = tmp_path / "lengths"
    assert "28 groups of 4 lengths" in ask(capsys, "--write-trace", str(path), "--seed", "5")
    assert read_length_trace(path).seed == 5
    drawn = json.loads(ask(capsys, "--as-json", "--seed", "5"))
    assert drawn["violations"] == 0
    assert drawn["steps"] == 6
    rest = [*SMALL[: SMALL.index("--length-median")], "--trace", str(path), "--as-json"]
    assert dispatch(["simulate", *rest]) == 0
    assert json.loads(capsys.readouterr().out) == drawn


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--weight-sync-steps", "6"], "raise max_staleness to at least 5"),
        (["--reorder-window", "99"], "with prompts_per_step 8 the window may be at most 33"),
        (["--room", "0"], "greater than or equal to 1"),
        (["--train-token-s", "0"], "training takes no time; give one of them"),
        (["--trace", "here", "--length-median", "7"], "length_median has no effect with trace here"),
        (["--trace", "nowhere"], "length trace nowhere"),
        (["no-such-run"], "name a directory with config.json in it"),
    ],
)
def test_what_cannot_be_simulated_is_refused(flags: list[str], reason: str):
    with pytest.raises(ConfigError, match=reason):
        dispatch(["simulate", *flags])


def test_a_line_is_fitted_without_costs_below_zero():
    x = np.array([1.0, 2.0, 3.0])
    assert fit_line(x, 2 * x + 5) == pytest.approx((2.0, 5.0))
    assert fit_line(x, 9 - 2 * x) == pytest.approx((0.0, 5.0))
    assert fit_line(x, 2 * x - 1) == pytest.approx((1.5, 0.0))
    assert fit_line(np.full(3, 4.0), np.full(3, 8.0)) == pytest.approx((2.0, 0.0))
