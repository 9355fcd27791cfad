"""`staleness_control = "auto"` against every fixed depth, over six regimes that change in mid-run, on the simulator.

The shipped scheduler under a virtual clock, so these are not timings but what follows from a seed: trained tokens per
virtual second against the best fixed depth, and mean staleness against the smallest fixed depth that reaches 0.95 of
that. `python -m tests.bench.steering` prints all depths and every move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tests.bench.harness import Row, round_number

if TYPE_CHECKING:
    from learner.tuning.controller import Move
    from learner.tuning.forecast import Forecast, Step
    from learner.tuning.simulator import Simulation
    from learner.tuning.workload import Costs

PROMPTS, SAMPLES, ROOM, MAX_STALENESS = 8, 8, 24, 4
REGIME_STEPS, QUICK_REGIME_STEPS = 150, 60
WARM_UP_STEPS = 10
CLOSE = 0.95


def regimes() -> list[Costs]:
    """Balanced; training slow; rollouts slow; completions short; completions long and weights slow; balanced again."""
    from learner.tuning.workload import Costs

    token_s = 0.001
    balanced = Costs(decode_token_s=token_s, occupancy_cost=1.0, train_token_s=2 * token_s / ROOM)
    return [
        balanced,
        replace(balanced, train_token_s=2.5 * balanced.train_token_s),
        replace(balanced, train_token_s=0.4 * balanced.train_token_s),
        replace(balanced, length_factor=0.4, train_step_s=0.1),
        replace(balanced, length_factor=1.5, publish_s=0.5),
        balanced,
    ]


def play(depth: int | None, *, quick: bool) -> tuple[Forecast, list[Move]]:
    """Run through all regimes at a fixed depth, or (None) steered."""
    from learner.tuning.controller import DepthController, Observation
    from learner.tuning.simulator import simulate
    from learner.tuning.trace import lognormal_trace
    from learner.tuning.workload import Dial, Workload

    costs, each = regimes(), QUICK_REGIME_STEPS if quick else REGIME_STEPS
    trace = lognormal_trace(
        num_groups=4000,
        num_generations=SAMPLES,
        median=60,
        p99_over_p50=10,
        max_completion_length=600,
        seed=1 + round_number(),
    )
    workload = Workload(
        trace=trace, costs=costs[0], room=ROOM, costs_at=lambda version: costs[min(version // each, len(costs) - 1)]
    )
    controller = DepthController(depth=MAX_STALENESS, lowest=0, highest=MAX_STALENESS)
    moves: list[Move] = []
    before = (0.0, 0.0)

    def each_step(simulation: Simulation, step: Step) -> None:
        nonlocal before
        for server in simulation.servers:
            server.advance()
        seat_s = sum(server.engine.seat_s for server in simulation.servers)
        (last_s, last_seat_s), before = before, (step.ended_s, seat_s)
        ledger, interval_s = simulation.coordinator.ledger, step.ended_s - last_s
        if depth is not None:
            ledger.limit_depth(depth)
            return
        seen = Observation(
            step=step.policy_version,
            learner_idle=min(1.0, step.waited_s / interval_s),
            room_unused=max(0.0, 1.0 - (seat_s - last_seat_s) / (interval_s * ROOM)),
        )
        if (move := controller.decide(seen)) is not None:
            ledger.limit_depth(move.new)
            moves.append(move)

    dial = Dial(prompts_per_step=PROMPTS, num_generations=SAMPLES, max_staleness=MAX_STALENESS, reorder_window=1)
    steps = each * len(costs) - WARM_UP_STEPS
    return simulate(workload, dial, steps=steps, warmup_steps=WARM_UP_STEPS, each_step=each_step), moves


def steered(quick: bool) -> dict[str, float]:
    forecast, moves = play(None, quick=quick)
    assert moves, "nothing was steered"
    assert forecast.violations == 0
    return {"tokens_s": forecast.trained_tokens_s, "staleness": forecast.staleness_group_mean}


def fixed(quick: bool) -> dict[str, float]:
    """The best speed of any depth, and the staleness of the smallest that comes close to it."""
    forecasts = [play(depth, quick=quick)[0] for depth in range(MAX_STALENESS + 1)]
    best = max(forecast.trained_tokens_s for forecast in forecasts)
    close = next(forecast for forecast in forecasts if forecast.trained_tokens_s >= CLOSE * best)
    return {"tokens_s": best, "staleness": close.staleness_group_mean}


ROWS = [
    Row(
        name="steered_speed", control="best fixed depth", ours=steered, baseline=fixed, ratio="ours/baseline",
        target=CLOSE, unit="tokens/s", figure="tokens_s", contest="steering", rounds=3,
    ),
    Row(
        name="steered_staleness", control="least depth with 0.95 of it", ours=steered, baseline=fixed,
        ratio="ours/baseline", target=1.0, sense="lower", unit="steps", figure="staleness", contest="steering",
        rounds=3,
    ),
]  # fmt: skip


def main() -> None:
    for depth in (*range(MAX_STALENESS + 1), None):
        forecast, moves = play(depth, quick=False)
        print(
            f"depth {'auto' if depth is None else depth}: {forecast.trained_tokens_s:.0f} tokens/s, mean staleness"
            f" {forecast.staleness_group_mean:.2f}, learner idle {forecast.learner_idle:.0%}, rollout idle"
            f" {forecast.rollout_idle:.0%}",
            flush=True,
        )
        for move in moves:
            print(f"  step {move.step}: {move.old} -> {move.new}, {move.reason}")


if __name__ == "__main__":
    main()
