"""headway-learner bench ppo-vs-grpo: is a critic worth its memory and its time? The same task, with and without.

GRPO's claim (DeepSeekMath, arXiv 2402.03300, section 4.1.1): the group's mean does as a baseline, so that PPO's critic,
a second model of the policy's size, can be left out. Both sides sort letters (sorting.py) from the same weights, with
the same prompts, as many samples and updates, the same clip and optimizer, a server and a learner process each, in
turn, synchronously (max_staleness 0: neither side's data is older). No group is filtered, as that would give GRPO more
samples than PPO. What differs is in SIDES.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from learner.config.section import Section
from learner.demo import sorting
from learner.demo.pair import free_port_pair, run_pair
from learner.demo.recipes import recipes
from learner.demo.run import DemoOptions, write_run
from protocol.errors import RunStopped
from protocol.settings import load_settings

NAME = "ppo-vs-grpo"
SIDES: dict[str, dict[str, Any]] = {
    "grpo": {"advantage_estimator": "grpo"},
    "ppo": {"advantage_estimator": "gae", "gamma": 1.0, "lam": 0.95, "value_learning_rate": 1e-3},
}
SAME: dict[str, Any] = {
    "filter_zero_std": False,
    "num_completions_logged": 0,
    "token_budget": 1024,
    "save_steps": 100_000,
}
WIDE = sorting.Shape(hidden_size=128, num_layers=4)
"""Large enough for a second one to be seen in the memory of a process."""
STEPS, QUICK_STEPS = 120, 6
MIB = 1 << 20
TRAINED_BYTES = 16
"""Of a parameter that trains in float32: itself, its gradient, AdamW's two moments. All models here do."""
EDGE_STEPS = 20
"""Steps at either end whose rewards are averaged, a third of them all at most."""


class PpoVsGrpoOptions(Section):
    """Train one small model on one task with PPO (a critic, GAE) and with GRPO (none), and compare what that takes.

    Prints models held, peak memory, step time and reward. About 7 minutes on two cores; --quick half of one.
    """

    quick: bool = False
    """A few steps of the tiniest model: shows that it works; its figures say nothing."""
    max_steps: int | None = Field(None, ge=1)
    """Training steps of each run; default 120, with --quick 6."""
    num_seeds: int | None = Field(None, ge=1)
    """Runs of each side, of seeds 0, 1, ...; default 2, with --quick 1."""
    output_dir: Path = Path("runs")
    """The runs are in output_dir/ppo-vs-grpo-N."""
    cache_dir: Path = Path("build/demo")
    """Models are made here once and found again."""

    @property
    def steps(self) -> int:
        """max_steps, or its default."""
        return self.max_steps or (QUICK_STEPS if self.quick else STEPS)

    @property
    def seeds(self) -> range:
        """Of the runs of each side."""
        return range(self.num_seeds or (1 if self.quick else 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What one run was like. Bytes, seconds; rewards are between 0 and 1."""

    parameters: dict[str, int]
    """Of every model that the learner held, by what it is."""
    peak_bytes: int | None
    """How far the learner's resident set rose above what it was before the models."""
    learner_cpu_s: float
    """CPU seconds of a step in the learner: forward, backward and optimizer, median."""
    step_s: float
    """All of a step, sampling included, median."""
    reward_first: float
    reward_last: float
    eval_first: float
    eval_last: float


def ppo_vs_grpo(argv: Sequence[str], *, prog: str) -> int:
    """Run both sides of every seed and print the comparison; return the exit code.

    Raises:
        ConfigError: A wrong flag.
        RunStopped: A run failed; names its logs.
    """
    options = load_settings(PpoVsGrpoOptions, argv, prog=prog)
    # One thread for this process and each child: with two on two busy cores, torch was seen 50 times slower.
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = time.monotonic()
    shape = sorting.Shape() if options.quick else WIDE
    model = options.cache_dir.resolve() / "sort" / ("model" if options.quick else f"model-{shape.hidden_size}")
    if not model.exists():
        print(f"making the model in {model} (once) ...", flush=True)
        sorting.prepare(model, shape=shape)
    folder = _free_folder(options.output_dir.resolve())
    figures: dict[str, list[Figures]] = {side: [] for side in SIDES}
    for seed in options.seeds:
        for side in sorted(SIDES, reverse=bool(seed % 2)):  # whoever goes first may find the machine busier
            print(f"{side}, seed {seed}: {folder / f'{side}-{seed}'} ...", flush=True)
            figures[side].append(_run_side(side, seed, options.steps, model=model, run_dir=folder / f"{side}-{seed}"))
    print(f"\n{describe(figures, steps=options.steps)}\n\n{time.monotonic() - started:.0f} s in all, one torch thread")
    return 0


def _run_side(side: str, seed: int, steps: int, *, model: Path, run_dir: Path) -> Figures:
    recipe = recipes()["sort"]
    recipe = dataclasses.replace(recipe, learner={**recipe.learner, **SAME, **SIDES[side]})
    options = DemoOptions(task="sort", engine="transformers", max_steps=steps, max_staleness=0, seed=seed)
    write_run(recipe, options, run_dir=run_dir, model=model, port=free_port_pair())
    logs, meter = run_dir / "logs", run_dir / "meter.json"
    code = run_pair(
        [sys.executable, "-m", "rollout_server", "--config", str(run_dir / "server.toml")],
        [sys.executable, "-m", "learner.demo.metered", str(meter), "--config", str(run_dir / "learner.toml")],
        server_log=logs / "server.log",
        learner_log=logs / "terminal.log",
    )
    if code:
        raise RunStopped(f"{side} with seed {seed} ended with exit code {code}: read {logs}")
    return read_figures(run_dir)


def read_figures(run_dir: Path) -> Figures:
    """Reduce what a finished run left."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()]
    summary = json.loads((run_dir / "summary.json").read_text("utf-8"))
    meter = json.loads((run_dir / "meter.json").read_text("utf-8"))
    rewards = [row["reward"] for row in rows]
    edge = _edge(len(rewards))
    return Figures(
        parameters=meter["parameters"],
        peak_bytes=meter["peak_bytes"],
        learner_cpu_s=statistics.median(meter["cpu_s"]),
        step_s=statistics.median(row["step_time"] for row in rows),
        reward_first=statistics.fmean(rewards[:edge]),
        reward_last=statistics.fmean(rewards[-edge:]),
        eval_first=summary["eval_first"],
        eval_last=summary["eval_last"],
    )


def describe(figures: dict[str, list[Figures]], *, steps: int) -> str:
    """Put both sides into a table: every seed's value, and the ratio of their medians where it says something."""
    edge = _edge(steps)
    rows: list[tuple[str, Callable[[Figures], float | None], str, bool]] = [
        ("parameters, million", lambda of: sum(of.parameters.values()) / 1e6, ".2f", True),
        ("weights, gradients, moments, MiB", lambda of: TRAINED_BYTES * sum(of.parameters.values()) / MIB, ".1f", True),
        ("peak memory over base, MiB", lambda of: of.peak_bytes and of.peak_bytes / MIB, ".1f", True),
        ("learner's step, CPU s", lambda of: of.learner_cpu_s, ".3f", True),
        ("step with sampling, wall s", lambda of: of.step_s, ".3f", True),
        (f"reward, first {edge} steps", lambda of: of.reward_first, ".3f", False),
        (f"reward, last {edge} steps", lambda of: of.reward_last, ".3f", False),
        ("evaluation before", lambda of: of.eval_first, ".3f", False),
        ("evaluation after", lambda of: of.eval_last, ".3f", False),
    ]
    held = [f"{len(runs[0].parameters)}: {', '.join(runs[0].parameters)}" for runs in figures.values()]
    table = [["", *figures, "ppo / grpo"], ["models held by the learner", *held, ""]]
    for name, value, spec, comparable in rows:
        cells, medians = [], []
        for runs in figures.values():
            values = [number for number in map(value, runs) if number is not None]
            cells.append("  ".join(format(number, spec) for number in values) or "unknown")
            medians.append(statistics.median(values) if values else 0.0)
        grpo, ppo = medians
        table.append([name, *cells, f"{ppo / grpo:.2f}" if comparable and grpo else ""])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join("   ".join(map(str.ljust, row, widths)).rstrip() for row in table)


def _edge(steps: int) -> int:
    return max(1, min(EDGE_STEPS, steps // 3))


def _free_folder(output_dir: Path) -> Path:
    number = 1
    while (output_dir / f"{NAME}-{number}").exists():
        number += 1
    return output_dir / f"{NAME}-{number}"
