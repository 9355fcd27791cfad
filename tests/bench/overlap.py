"""What running ahead is worth: a server process and a learner process, balanced, asynchronous against synchronous.

Generation is the `scripted` engine (mild lengths: p99 / p50 is 1.2), training is a sleep of exactly as long as the
engine needs for a step's samples with no place ever empty; all the rest are the shipped processes, over real sockets,
with real (small) weights going back after every step. With nothing lost, an asynchronous step takes
max(generation, training) and a synchronous one their sum. `python -m tests.bench.overlap` prints where the time goes.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.harness import Row

PROMPTS_PER_STEP, NUM_GENERATIONS = 8, 8
ROOM = 16
MAX_STALENESS = 4
MEAN_LENGTH, MAX_LENGTH = 50, 80
SCRIPT = {"vocab_size": 40, "mean_length": MEAN_LENGTH, "length_sigma": 0.08, "token_s": 0.0015, "occupancy_cost": 0.5}
WARM_UP_STEPS = 6
"""Until a run is as far ahead as it may be, and every buffer has been used."""
STEPS, QUICK_STEPS = 20, 10


@dataclass(frozen=True)
class Outcome:
    """What a run did after its first steps."""

    step_s: float
    """Mean seconds from step to step; the median would hide a rhythm of short and long ones."""
    median_s: float
    wait_s: float
    """Of that, the learner's wait for a batch."""
    overhead_s: float
    """Of that, neither waiting for a batch nor training."""
    occupancy: float
    """Part of the engine's places in use, from heartbeat to heartbeat."""
    loop_lag_ms: float
    staleness: list[int]
    """The oldest token of each step."""


def overlapped(quick: bool) -> float:
    outcome = run_processes(MAX_STALENESS, quick=quick)
    assert max(outcome.staleness) > 0, "nothing ran ahead: this is no asynchronous run"
    return outcome.step_s


def synchronous(quick: bool) -> float:
    return run_processes(0, quick=quick).step_s


def longer_side(quick: bool) -> float:
    """Both sides take as long: training sleeps for what generation needs."""
    return generation_seconds(quick)


def num_steps(quick: bool) -> int:
    return WARM_UP_STEPS + (QUICK_STEPS if quick else STEPS)


def generation_seconds(quick: bool) -> float:
    """Seconds a step that the engine takes for the samples of the whole run when it always has the next one.

    Exact, not timed: the engine runs on a virtual clock.
    """
    from learner.tuning.virtual_time import run_virtual
    from protocol.identity import group_seed
    from rollout_server.config import ScriptedOptions
    from rollout_server.engines.base import GenerationRequest, StagedWeights
    from rollout_server.engines.scripted import ScriptedEngine
    from tests.factories import INITIAL, make_lease, make_sampling

    async def play() -> float:
        async with ScriptedEngine(ScriptedOptions.model_validate(SCRIPT), ROOM) as engine:
            await engine.load_weights(StagedWeights(version=INITIAL, path=Path()))
            requests = [
                GenerationRequest(
                    group_id=str(ordinal),
                    prompt_tokens=make_lease().prompt_tokens,
                    num_generations=NUM_GENERATIONS,
                    sampling=make_sampling(max_completion_length=MAX_LENGTH),
                    seed=group_seed(0, ordinal),
                )
                for ordinal in range(PROMPTS_PER_STEP * num_steps(quick))
            ]
            await asyncio.gather(*[engine.generate(request) for request in requests])
            return asyncio.get_running_loop().time()

    return run_virtual(play()) / num_steps(quick)


def run_processes(max_staleness: int, *, quick: bool) -> Outcome:
    """Run a server and a learner to the end of training."""
    from tests.system.harness import END_S, Lab

    with tempfile.TemporaryDirectory() as directory:
        with Lab(Path(directory), Path(directory) / "model") as lab:
            config = {
                "bind": lab.address, "model": str(lab.model), "dataset": str(lab.data()),
                "output_dir": str(lab.run.path.parent), "run_name": lab.run.path.name,
                "num_generations": NUM_GENERATIONS, "prompts_per_step": PROMPTS_PER_STEP,
                "max_completion_length": MAX_LENGTH, "max_staleness": max_staleness, "max_steps": num_steps(quick),
                "filter_zero_std": False,
            }  # fmt: skip
            module = ["tests.bench.sleeping_learner", str(generation_seconds(quick)), "0"]
            written = lab.write_config("learner", config)
            learner = lab.start("learner", module, written, lab.run.path / "logs" / "learner.log")
            server = lab.server(room=ROOM, scripted=SCRIPT)
            try:
                lab.wait_step(num_steps(quick), alive=[learner, server])
                assert (learner.wait_exit(END_S), server.wait_exit(END_S)) == (0, 0)
            except AssertionError as error:  # its text ends with the logs; the last line is what a row gives as reason
                print(error, file=sys.stderr)
                raise AssertionError(str(error).partition("\n")[0]) from None
            outcome = measure(lab.run.rows())
    assert max(outcome.staleness) <= max_staleness, f"staleness {max(outcome.staleness)}, bound {max_staleness}"
    return outcome


def measure(rows: list[dict[str, Any]]) -> Outcome:
    """Reduce metrics.jsonl."""
    steps = rows[WARM_UP_STEPS:]
    step_s = (steps[-1]["wall_s"] - rows[WARM_UP_STEPS - 1]["wall_s"]) / len(steps)
    observed = [row for row in steps if row["rollout/observed_s"]]  # a heartbeat fell into the step
    wait_s = statistics.mean(row["perf/rollout_wait_s"] for row in steps)
    training_s = statistics.mean(row["perf/fwd_bwd_s"] for row in steps)
    return Outcome(
        step_s=step_s,
        median_s=statistics.median(row["step_time"] for row in steps),
        wait_s=wait_s,
        overhead_s=step_s - wait_s - training_s,
        occupancy=sum(row["rollout/occupancy"] * row["rollout/observed_s"] for row in observed)
        / sum(row["rollout/observed_s"] for row in observed),
        loop_lag_ms=max(row["loop_lag_ms"] for row in rows),
        staleness=[int(row["staleness/max"]) for row in rows],
    )


ROWS = [
    Row(
        name="overlap_step",
        control="max(generation, training)",
        ours=overlapped,
        baseline=longer_side,
        ratio="ours/baseline",
        target=1.10,
        sense="lower",
        unit="s a step",
    ),
    Row(
        name="overlap_speedup",
        control="max_staleness 0",
        ours=overlapped,
        baseline=synchronous,
        ratio="baseline/ours",
        target=1.8,
        sense="higher",
        unit="s a step",
    ),
]


def main() -> None:
    quick = "--quick" in sys.argv
    print(f"longer side {longer_side(quick):.3f} s a step")
    for max_staleness in (MAX_STALENESS, 0):
        print(f"max_staleness {max_staleness}: {run_processes(max_staleness, quick=quick)}")


if __name__ == "__main__":
    main()
