"""What the runs say: a table, the figure, and what the pair of five seeds is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

from tests.bench.staleness.exact import Outcome
from tests.bench.staleness.runs import DEFAULT, METHODS, PAIR, PAIR_RECIPE, RECIPES, STALENESS, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Outcomes = Mapping[Setting, Outcome]
STYLES = {"uncorrected": ("#D55E00", "s:"), "behavior anchor": ("#0072B2", "o-"), "decoupled": ("#009E73", "^--")}
"""Color and line by method; no two differ by color alone."""
PNG_DPI = 110


def evaluations(outcomes: Outcomes, *, recipe: str, staleness: int, method: str) -> list[float]:
    """Return the evaluations of a setting after training, by seed. At staleness 0 all methods are one."""
    method = method if staleness else DEFAULT
    found = {
        each.seed: outcome.evaluation
        for each, outcome in outcomes.items()
        if (each.recipe, each.staleness, each.method) == (recipe, staleness, method)
    }
    return [found[seed] for seed in sorted(found)]


def before_training(outcomes: Outcomes) -> float:
    """Return the mean reward of all samples that version 0 drew: of the steps it sampled ahead, and the first."""
    rewards = [reward for each, outcome in outcomes.items() for reward in outcome.rewards[: each.staleness + 1]]
    return fmean(rewards)


def table(outcomes: Outcomes) -> str:
    """Return the evaluations in Markdown: mean and standard deviation over seeds, where there are several."""
    lines = ["| recipe | method | " + " | ".join(map(str, STALENESS)) + " |", "|---" * (len(STALENESS) + 2) + "|"]
    for recipe in RECIPES:
        for method in METHODS:
            cells = [
                _cell(evaluations(outcomes, recipe=recipe, staleness=staleness, method=method))
                for staleness in STALENESS
            ]
            lines.append(f"| {recipe} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(outcomes: Outcomes) -> str:
    """Say how far apart the pair is, seed by seed, and against which noise."""
    fresh, stale = (
        evaluations(outcomes, recipe=PAIR_RECIPE, staleness=staleness, method=DEFAULT) for staleness in PAIR
    )
    differences = [b - a for a, b in zip(fresh, stale, strict=True)]
    lines = [f"before training: {before_training(outcomes):.3f}"]
    if len(differences) > 1:
        error = stdev(differences) / math.sqrt(len(differences))
        lines.append(
            f"staleness {PAIR[1]} less staleness {PAIR[0]} ({DEFAULT}, {PAIR_RECIPE}, {len(differences)} seeds):"
            f" {fmean(differences):+.3f}, standard error {error:.3f}; over seeds {stdev(fresh):.3f} and"
            f" {stdev(stale):.3f}"
        )
    return "\n".join(lines)


def draw(outcomes: Outcomes, png: Path) -> None:
    """Draw the evaluation after training against staleness, a panel for each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), dpi=PNG_DPI, layout="constrained")
    panels = figure.subplots(1, len(RECIPES), sharey=True)
    for axes, recipe in zip(panels, RECIPES, strict=True):
        _panel(axes, outcomes, recipe)
    panels[0].set_ylabel("sorted correctly after training")
    panels[0].legend(fontsize=8, framealpha=0.85, edgecolor="none", loc="lower left")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, format="png")


def _panel(axes: Axes, outcomes: Outcomes, recipe: str) -> None:
    places = range(len(STALENESS))
    for method, (color, line) in STYLES.items():
        by_place = [evaluations(outcomes, recipe=recipe, staleness=s, method=method) for s in STALENESS]
        drawn = [(place, values) for place, values in zip(places, by_place, strict=True) if values]
        axes.plot(
            [place for place, _ in drawn], [fmean(values) for _, values in drawn], line, color=color, label=method
        )
        dots = [(place, value) for place, values in drawn for value in values]
        axes.plot([place for place, _ in dots], [value for _, value in dots], ".", color=color, alpha=0.4, ms=4)
    axes.axhline(before_training(outcomes), color="#5F6368", ls="-.", lw=1, label="before training")
    axes.set_xticks(list(places), [str(staleness) for staleness in STALENESS])
    axes.set_xlabel("staleness of every token, in steps")
    axes.set_title(f"per batch: {recipe}", fontsize=10)
    axes.set_ylim(0, None)
    axes.grid(visible=True, alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _cell(values: list[float]) -> str:
    if not values:
        return "-"
    return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")
