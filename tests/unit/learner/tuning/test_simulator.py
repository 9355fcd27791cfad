"""The shipped scheduler under a virtual clock: what asynchrony buys, no deadlock, and the bound."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from learner.ledger import Ledger
from learner.tuning.forecast import Forecast, Step
from learner.tuning.simulator import Simulation, SimulationStuck, fullness, simulate
from learner.tuning.trace import lognormal_trace
from learner.tuning.workload import Costs, Dial, Workload
from protocol.errors import ConfigError

SEATS, CUT = {"A": 85, "B": 64}, {"A": 10, "B": 20}
PUBLISHED = {"A": (1.71, 2.27, 2.63, 2.70), "B": (1.66, 2.13, 2.48, 2.70)}
"""Speed over synchronous at max_staleness 1 to 4 in an independent simulation, with S = m and W = 1."""


def regime(name: str, *, steps: int = 60, seed: int = 1) -> Workload:
    """P = G = 16 on one server; training takes for a token as long as the engine with all seats taken."""
    trace = lognormal_trace(
        num_groups=16 * (steps + 25), num_generations=16, median=100, p99_over_p50=10,
        max_completion_length=CUT[name] * 100, seed=seed,
    )  # fmt: skip
    token_s = 2 * 0.01 / SEATS[name]
    step_s = token_s * 256 * float(trace.lengths.mean())
    costs = Costs(decode_token_s=0.01, occupancy_cost=1.0, train_token_s=token_s, publish_s=0.02 * step_s)
    return Workload(trace=trace, costs=costs, room=SEATS[name])


def small(**changes: Any) -> Workload:
    trace = lognormal_trace(
        num_groups=64, num_generations=4, median=20, p99_over_p50=8, max_completion_length=150, seed=3
    )
    costs = Costs(
        decode_token_s=0.02, occupancy_cost=0.7, train_token_s=0.002, train_step_s=0.1, prefill_s=0.01, reward_s=0.2,
        pause_s=0.05, publish_s=0.1,
    )  # fmt: skip
    return replace(Workload(trace=trace, costs=costs, room=6), **changes)


def ask(workload: Workload, *, steps: int = 25, warmup_steps: int = 5, each_step: Any = None, **dial: Any) -> Forecast:
    words = {"prompts_per_step": 3, "num_generations": 4, "max_staleness": 2} | dial
    return simulate(workload, Dial(**words), steps=steps, warmup_steps=warmup_steps, each_step=each_step)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A", "B"])
def test_what_asynchrony_buys_is_what_an_independent_simulation_says(name: str):
    workload = regime(name)
    words = {"prompts_per_step": 16, "num_generations": 16, "reorder_window": 1}
    steps_s = [ask(workload, steps=60, warmup_steps=15, max_staleness=m, **words).step_s for m in range(5)]
    speeds = [steps_s[0] / step_s for step_s in steps_s[1:]]
    assert speeds == pytest.approx(list(PUBLISHED[name]), rel=0.09)
    assert speeds == sorted(speeds)


@pytest.mark.slow
def test_at_the_default_dial_neither_side_waits_for_the_stragglers():
    """Seats are leased by the samples that are left: counting whole groups left 44 % of them empty here."""
    forecast = ask(regime("A"), steps=60, warmup_steps=15, prompts_per_step=16, num_generations=16, max_staleness=4)
    assert forecast.roofline > 0.97
    assert forecast.learner_idle < 0.03
    assert forecast.rollout_idle < 0.05


def test_the_same_arguments_give_the_same_forecast_and_another_seed_another_one():
    workload = small(servers=2)
    first = ask(workload)
    assert ask(workload) == first
    other = lognormal_trace(
        num_groups=64, num_generations=4, median=20, p99_over_p50=8, max_completion_length=150, seed=4
    )
    assert ask(replace(workload, trace=other)).step_s != first.step_s


@pytest.mark.parametrize("group_events", [False, True])
@pytest.mark.parametrize("servers", [1, 3])
def test_nothing_deadlocks_and_the_bound_holds_over_the_dial(servers: int, group_events: bool):
    reached = set()
    for m in range(6):
        for k in range(1, m + 2):
            for window in (None, 1, 4, 7):
                dial = Dial(
                    prompts_per_step=3, num_generations=4, max_staleness=m, reorder_window=window, weight_sync_steps=k
                )
                try:
                    _ = dial.bounds
                except ConfigError:
                    continue
                workload = small(servers=servers, group_events=group_events)
                forecast = simulate(workload, dial, steps=8, warmup_steps=3)
                assert (forecast.violations, forecast.unaccounted) == (0, 0)
                assert forecast.staleness_max <= m
                reached.add((m, forecast.staleness_max))
    assert {(m, m) for m in range(1, 3)} <= reached, "the bound is no looser than it must be"


def test_every_server_gets_its_share_and_lengths_train_as_they_are_leased():
    forecast = ask(small(servers=4, room=2), steps=150, prompts_per_step=8, max_staleness=3)
    least, most = forecast.server_share
    assert least > 0.85
    assert most < 1.15
    assert forecast.length_ratio == pytest.approx(1.0, abs=0.03)


def test_whoever_swaps_first_does_not_take_the_groups_of_all_others():
    """Servers swap in turns, and the first had leased most of a step before the last: 0.13 to 1.67 of an even share."""
    trace = lognormal_trace(
        num_groups=32 * 40, num_generations=8, median=20, p99_over_p50=5, max_completion_length=150, seed=1
    )
    costs = Costs(decode_token_s=0.02, occupancy_cost=1.0, train_token_s=0.00001, publish_s=0.1)
    workload = Workload(trace=trace, costs=costs, room=4, servers=64, group_events=True)
    forecast = ask(workload, prompts_per_step=32, num_generations=8, max_staleness=4)
    least, most = forecast.server_share
    assert least > 0.6
    assert most < 1.4
    assert forecast.roofline > 0.7, "it was 0.61"


def test_a_synchronous_step_is_generation_and_training_one_after_the_other():
    trace = lognormal_trace(
        num_groups=8, num_generations=4, median=50, p99_over_p50=1, max_completion_length=99, seed=0
    )
    costs = Costs(decode_token_s=0.1, occupancy_cost=1.0, train_token_s=0.01, train_step_s=1.0, reward_s=0.5)
    workload = Workload(trace=trace, costs=replace(costs, publish_s=0.25, pause_s=0.125), room=8)
    forecast = ask(workload, prompts_per_step=2, max_staleness=0)
    generation_s, training_s = 50 * 0.1 * 2, 1.0 + 0.01 * 8 * 50
    assert forecast.step_s == pytest.approx(generation_s + 0.5 + training_s + 0.25 + 0.125)
    assert forecast.learner_idle == pytest.approx(1 - training_s / forecast.step_s)
    assert forecast.rollout_idle == pytest.approx(1 - generation_s / forecast.step_s)
    assert forecast.roofline_s == pytest.approx(generation_s)
    assert forecast.staleness_hist == (forecast.steps * 400,)


@pytest.mark.parametrize("max_staleness", [0, 2])
def test_filtered_groups_are_leased_anew_and_the_bound_holds(max_staleness: int):
    none = ask(small(), steps=40, max_staleness=max_staleness)
    half = ask(small(filtered_share=0.5), steps=40, max_staleness=max_staleness)
    assert (half.violations, half.unaccounted) == (0, 0)
    assert half.step_s > 1.2 * none.step_s, "twice as much is sampled for a step"


def test_steps_of_which_every_group_was_filtered_are_waited_through():
    forecast = ask(small(filtered_share=0.9), steps=10, warmup_steps=1, max_staleness=1)
    assert forecast.learner_idle > 0.5
    assert forecast.violations == 0


def test_steps_in_which_nothing_is_sampled_say_nothing_of_the_seats():
    """All of what the last steps train was sampled before them, and the next samples wait for their weights."""
    dial = Dial(prompts_per_step=3, num_generations=4, max_staleness=3, weight_sync_steps=4)
    slow = replace(small().costs, train_step_s=1000.0, publish_s=0.0)
    with pytest.raises(ConfigError, match="nothing is sampled in steps 2 to 3 of such a run"):
        fullness(small(costs=slow), dial, steps={2, 3})


def test_costs_may_change_in_mid_run_and_each_step_is_told():
    told: list[Step] = []
    slow = replace(small().costs, train_step_s=50.0)
    workload = small(costs_at=lambda version: slow if version >= 20 else small().costs)

    def note(simulation: Simulation, step: Step) -> None:
        assert simulation.coordinator.ledger.policy_version == step.policy_version
        told.append(step)

    ask(workload, each_step=note)
    assert [step.policy_version for step in told] == list(range(1, 31))
    assert max(step.trained_s for step in told[:20]) < 50 < min(step.trained_s for step in told[20:])


def test_a_scheduler_that_deadlocks_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Ledger, "live", lambda self, policy_version: None)  # slots never free
    with pytest.raises(SimulationStuck, match=r"step 3 of 30: .*9 of 9 slots in use"):
        ask(small())


def test_a_dial_that_cannot_progress_is_refused_with_the_numbers_that_would_do():
    with pytest.raises(ConfigError, match=r"weight_sync_steps 4 with S = 2 .* raise max_staleness to at least 3"):
        ask(small(), weight_sync_steps=4)
    with pytest.raises(ConfigError, match=r"reorder_window 8 .* the window may be at most 7"):
        ask(small(), reorder_window=8)
