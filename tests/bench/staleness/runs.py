"""Which runs the curve is made of, and the file that keeps their results: a run that is in it is not made again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.staleness.exact import Outcome, Task, run

TASK = Task(max_steps=80, options={"prompts_per_step": 8, "learning_rate": 2e-4, "warmup_steps": 5})
STALENESS = (0, 1, 2, 4, 8, 16)
RECIPES: dict[str, dict[str, Any]] = {
    "1 update": {"num_mini_batches": 1},
    "4 updates": {"num_mini_batches": 4},
    "4 updates, lr/4": {"num_mini_batches": 4, "learning_rate": 5e-5},
}
"""Updates per batch. AdamW moves the weights by about the learning rate in every update, however small its part of the
batch: four of a quarter move them as far as one does."""
METHODS: dict[str, dict[str, Any]] = {
    "uncorrected": {"anchor": "proximal", "importance_sampling_mode": "none"},
    "behavior anchor": {"anchor": "behavior"},
    "decoupled": {"anchor": "proximal", "importance_sampling_mode": "token_truncate"},
}
"""By name, the words of the learner's configuration.

uncorrected: samples count as if the weights at the start of the step had drawn them. behavior anchor (the default): the
clipped ratio is taken against the weights that did. decoupled (arXiv 2110.00641, AReaL): clipped against the start of
the step, and weighted by how much likelier those weights are to draw the token than the ones that did, at most 2.
"""
DEFAULT = "behavior anchor"
PAIR = (0, 4)
"""Compared with the default and one update per batch."""
PAIR_RECIPE = "1 update"
NUM_SEEDS = 5
"""Of the pair."""
CURVE_SEEDS = 2
"""Of every other setting."""


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class Setting:
    """One run."""

    seed: int
    recipe: str
    staleness: int
    method: str

    @property
    def options(self) -> dict[str, Any]:
        """Words of the learner's configuration."""
        return {**METHODS[self.method], **RECIPES[self.recipe]}


def settings(*, num_seeds: int = NUM_SEEDS, curve_seeds: int = CURVE_SEEDS) -> list[Setting]:
    """Return all runs of the figure, each once, the pair first.

    At staleness 0 the three methods are one objective, every ratio being 1 when a step begins: it is run once.
    """
    pair = [
        Setting(seed=seed, recipe=PAIR_RECIPE, staleness=staleness, method=DEFAULT)
        for seed in range(num_seeds)
        for staleness in PAIR
    ]
    curve = [
        Setting(seed=seed, recipe=recipe, staleness=staleness, method=method)
        for seed in range(curve_seeds)
        for recipe in RECIPES
        for staleness in STALENESS
        for method in (METHODS if staleness else (DEFAULT,))
    ]
    return list(dict.fromkeys([*pair, *curve]))


class Results:
    """Outcomes by setting, in a JSON file that is whole after every run."""

    def __init__(self, file: Path, task: Task) -> None:
        self._file = file
        self._task = json.loads(json.dumps(asdict(task)))
        content = json.loads(file.read_text("utf-8")) if file.exists() else {"task": self._task, "runs": []}
        if content["task"] != self._task:
            raise SystemExit(
                f"{file} has runs of another task, {content['task']}: move it away, or name another --json"
            )
        self.outcomes = {Setting(**each["setting"]): Outcome(**each["outcome"]) for each in content["runs"]}

    def add(self, setting: Setting, outcome: Outcome) -> None:
        """Keep an outcome and write the file, one run a line."""
        self.outcomes[setting] = _rounded(outcome)
        lines = [
            json.dumps({"setting": asdict(each), "outcome": asdict(self.outcomes[each])})
            for each in sorted(self.outcomes)
        ]
        words = {"task": self._task, "methods": METHODS, "recipes": RECIPES}
        head = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in words.items())
        self._file.write_text("{" + head + ',\n"runs": [\n' + ",\n".join(lines) + "\n]}\n", "utf-8")


def run_missing(
    results: Results, wanted: Sequence[Setting], task: Task, *, model: Path, say: Callable[[str], None]
) -> None:
    """Make the runs that have no result."""
    for setting in wanted:
        if setting in results.outcomes:
            continue
        started = time.monotonic()
        outcome = run(task, model=model, staleness=setting.staleness, seed=setting.seed, options=setting.options)
        results.add(setting, outcome)
        say(
            f"seed {setting.seed}, {setting.recipe}, staleness {setting.staleness:>2}, {setting.method}:"
            f" {outcome.evaluation:.3f} ({time.monotonic() - started:.0f} s)"
        )


def _rounded(outcome: Outcome) -> Outcome:
    """Four digits: what is said of a run is the same before and after it was read back."""
    return Outcome(
        rewards=[round(x, 4) for x in outcome.rewards],
        evaluation=round(outcome.evaluation, 4),
        metrics={key: round(x, 4) for key, x in outcome.metrics.items()},
    )
