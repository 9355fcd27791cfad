"""The regimes of the benches: their lengths are what they say, and a run that measured something else is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from protocol.length_trace import read_length_trace
from tests.bench.regime_run import Outcome, check, measure
from tests.bench.regime_trace import NUM_GENERATIONS, PROMPTS_PER_STEP, SEEDS, STEP_S, A, B, C, Regime, Speeds, draw

GOOD = Outcome(
    step_s=0.41, idle_s=0.0, train_s=0.4, generation_s=0.4, live_s=0.004, staleness=4, occupancy=0.99, loop_lag_ms=1.0
)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_the_traces_kept_are_those_that_their_seeds_draw(seed: int) -> None:
    kept, drawn = read_length_trace(A.path(seed)), draw(A, seed)
    assert (kept.seed, kept.origin) == (seed, drawn.origin)
    np.testing.assert_array_equal(kept.lengths, drawn.lengths)


@pytest.mark.parametrize(("regime", "tail"), [(A, 10), (B, 10), (C, 1.1)])
def test_lengths_have_the_tail_and_the_cut_of_their_regime(regime: Regime, tail: float) -> None:
    lengths = draw(regime, 0).lengths
    assert np.quantile(lengths, 0.98) / np.median(lengths) == pytest.approx(tail ** (2.0537 / 2.3263), rel=0.05)
    assert lengths.max() <= regime.cut * 20
    assert (lengths.max() == regime.cut * 20) == (regime is not C)


@pytest.mark.parametrize("regime", [A, B, C])
def test_both_sides_take_as_long_for_a_step(regime: Regime) -> None:
    trace = draw(regime, 1)
    speeds, tokens = Speeds.of(regime, trace), PROMPTS_PER_STEP * NUM_GENERATIONS * trace.lengths.mean()
    assert speeds.train_token_s * tokens == pytest.approx(STEP_S)
    assert 2 * speeds.token_s / regime.seats * tokens == pytest.approx(STEP_S)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"staleness": 5}, "max_staleness 4: staleness 5"),
        ({"train_s": 0.41}, "void: training took"),
        ({"train_s": 0.39}, "void: training took"),
        ({"live_s": 0.009}, "void: weights were live 2.2% of a step after it"),
    ],
)
def test_a_run_that_measured_something_else_is_refused(change: dict[str, float], why: str) -> None:
    check(GOOD, 4, unaccounted=0)
    with pytest.raises(AssertionError, match=why):
        check(replace(GOOD, **change), 4, unaccounted=0)


def test_a_lost_group_is_told_of() -> None:
    with pytest.raises(AssertionError, match="1 groups unaccounted"):
        check(GOOD, 4, unaccounted=1)


def test_what_is_measured_begins_after_the_warm_up() -> None:
    rows = [
        {"wall_s": 100.0 + step, "perf/rollout_wait_s": 0.25, "perf/weight_sync_s": 0.05, "perf/fwd_bwd_s": 0.5,
         "step_tokens": 100, "weights/live_s": 0.01, "staleness/max": 9 if step == 3 else 1, "rollout/observed_s": 2.0,
         "rollout/occupancy": 0.5, "loop_lag_ms": 3.0}
        for step in range(15)
    ]  # fmt: skip
    rows += [{**rows[0], "wall_s": 114.0 + 2.0 * step, "step_tokens": 200} for step in range(1, 6)]
    outcome = measure(rows, Speeds(1.0, 0.001))
    assert (outcome.step_s, outcome.idle_s, outcome.generation_s) == pytest.approx((2.0, 0.3, 0.2))
    assert (outcome.staleness, outcome.occupancy) == (9, 0.5)
