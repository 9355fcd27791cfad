"""One run of a regime: a server and a learner process, shipped but for what is slept, from the first step to the last.

python -m tests.bench.regime_run a 4 [SEED] [--quick]    prints what the run did and what it should have done
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.tuning.simulator import simulate
from learner.tuning.workload import Costs, Dial, Workload
from protocol.length_trace import LengthTrace, write_length_trace
from tests.bench.regime_trace import (
    NUM_GENERATIONS,
    PROMPTS_PER_STEP,
    QUICK_STEPS,
    REGIMES,
    STEPS,
    WARM_UP_STEPS,
    Regime,
    Speeds,
)

HEARTBEAT_S = 0.02
"""As a second is to a step of half a minute."""
LIMIT_S = 850.0
MOST_LIVE = 0.02
"""Of a step, until weights are live."""
MOST_UNBALANCED = 0.02


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did in the steps that are measured; times are those of a mean step."""

    step_s: float
    idle_s: float
    """The learner waited, for a batch or for the previous publish."""
    train_s: float
    generation_s: float
    """What the same tokens take an engine whose seats are all taken."""
    live_s: float
    """From the optimizer's step to weights that a server samples with."""
    staleness: int
    """Of the oldest token ever trained."""
    occupancy: float
    """Part of the engine's places in use."""
    loop_lag_ms: float
    """The worst p99 lateness of the learner's event loop."""

    @property
    def roofline_s(self) -> float:
        """No run can be faster than the slower side alone."""
        return max(self.train_s, self.generation_s)


def run_regime(regime: Regime, seed: int, max_staleness: int, *, quick: bool) -> Outcome:
    """Run both processes to the end of training and say what they did.

    Raises:
        AssertionError: the run is no measurement: it failed, was unbalanced, or took its weights too late.
    """
    from tests.system.harness import Lab

    trace, steps = regime.trace(seed), WARM_UP_STEPS + num_steps(quick)
    with tempfile.TemporaryDirectory() as directory, Lab(Path(directory), Path(directory) / "model") as lab:
        lengths = Path(directory) / "lengths"
        write_length_trace(lengths, trace)
        speeds = Speeds.of(regime, trace)
        learner = lab.start(
            "learner",
            ["tests.bench.sleeping_learner", "0", str(speeds.train_token_s)],
            lab.write_config("learner", learner_config(lab.address, Path(directory), trace, max_staleness, steps)),
            lab.run.path / "logs" / "learner.log",
        )
        script = {"vocab_size": 40, "lengths": str(lengths), "token_s": speeds.token_s, "occupancy_cost": 1.0}
        server = lab.start(
            "server",
            ["rollout_server"],
            lab.write_config(
                "server",
                {"learner": lab.address, "name": "server", "engine": "scripted", "room": regime.seats,
                 "log_file": str(lab.directory / "server.log"), "scripted": script},
            ),
            lab.directory / "server.log",
        )  # fmt: skip
        try:
            assert (learner.wait_exit(LIMIT_S), server.wait_exit(LIMIT_S)) == (0, 0)
        except AssertionError as error:
            print(error, learner.tail(), server.tail(), file=sys.stderr)
            raise AssertionError(f"max_staleness {max_staleness}: a process failed") from None
        outcome = measure(lab.run.rows(), speeds)
        summary = lab.run.summary()
    print(outcome, file=sys.stderr)
    check(outcome, max_staleness, unaccounted=summary["groups_unaccounted"])
    return outcome


def learner_config(address: str, directory: Path, trace: LengthTrace, max_staleness: int, steps: int) -> dict[str, Any]:
    return {
        "bind": address, "model": str(directory / "model"), "dataset": str(directory / "data.jsonl"),
        "output_dir": str(directory / "runs"), "run_name": "run", "seed": trace.seed,
        "num_generations": NUM_GENERATIONS, "prompts_per_step": PROMPTS_PER_STEP,
        "max_completion_length": int(trace.lengths.max()), "max_staleness": max_staleness, "max_steps": steps,
        "filter_zero_std": False, "heartbeat_s": HEARTBEAT_S, "save_steps": steps, "server_wait_s": 30.0,
    }  # fmt: skip


def predict_step_s(regime: Regime, seed: int, max_staleness: int, *, live_s: float, quick: bool) -> float:
    """What `headway-learner simulate` says of a mean step."""
    trace = regime.trace(seed)
    speeds = Speeds.of(regime, trace)
    costs = Costs(
        decode_token_s=speeds.token_s, occupancy_cost=1.0, train_token_s=speeds.train_token_s, publish_s=live_s
    )
    dial = Dial(prompts_per_step=PROMPTS_PER_STEP, num_generations=NUM_GENERATIONS, max_staleness=max_staleness)
    workload = Workload(trace=trace, costs=costs, room=regime.seats, heartbeat_s=HEARTBEAT_S)
    return simulate(workload, dial, steps=num_steps(quick), warmup_steps=WARM_UP_STEPS).step_s


def num_steps(quick: bool) -> int:
    """Steps that are measured."""
    return QUICK_STEPS if quick else STEPS


def measure(rows: Sequence[dict[str, Any]], speeds: Speeds) -> Outcome:
    """Reduce metrics.jsonl."""
    steps = rows[WARM_UP_STEPS:]
    observed_s = sum(row["rollout/observed_s"] for row in steps)
    return Outcome(
        step_s=(steps[-1]["wall_s"] - rows[WARM_UP_STEPS - 1]["wall_s"]) / len(steps),
        idle_s=statistics.mean(row["perf/rollout_wait_s"] + row["perf/weight_sync_s"] for row in steps),
        train_s=statistics.mean(row["perf/fwd_bwd_s"] for row in steps),
        generation_s=statistics.mean(row["step_tokens"] for row in steps) * speeds.train_token_s,
        live_s=statistics.mean(row["weights/live_s"] for row in steps),
        staleness=max(int(row["staleness/max"]) for row in rows),
        occupancy=sum(
            row["rollout/occupancy"] * row["rollout/observed_s"] for row in steps if row["rollout/observed_s"]
        )
        / observed_s,
        loop_lag_ms=max(row["loop_lag_ms"] for row in rows),
    )


def check(outcome: Outcome, max_staleness: int, *, unaccounted: int) -> None:
    """Refuse a run that measured something else."""
    about = f"max_staleness {max_staleness}"
    assert outcome.staleness <= max_staleness, f"{about}: staleness {outcome.staleness}"
    assert unaccounted == 0, f"{about}: {unaccounted} groups unaccounted"
    unbalanced = abs(outcome.train_s / outcome.generation_s - 1)
    assert unbalanced <= MOST_UNBALANCED, f"{about}: void: training took {unbalanced:.1%} more or less than generation"
    late = outcome.live_s / outcome.train_s
    assert late <= MOST_LIVE, f"{about}: void: weights were live {late:.1%} of a step after it"


def main(name: str, max_staleness: str, *arguments: str) -> None:
    regime, quick = REGIMES[name], "--quick" in arguments
    seed = next((int(argument) for argument in arguments if argument.isdigit()), 0)
    outcome = run_regime(regime, seed, int(max_staleness), quick=quick)
    predicted_s = predict_step_s(regime, seed, int(max_staleness), live_s=outcome.live_s, quick=quick)
    print(f"predicted {predicted_s:.4f} s, so {outcome.step_s / predicted_s:.3f} of it")


if __name__ == "__main__":
    main(*sys.argv[1:])
