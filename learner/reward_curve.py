"""The reward curve of a run as a PNG, from its metrics.jsonl. The only file that imports matplotlib.

Reads files, so it works while a run goes on, after it, and on a copy of the run directory. Colors are of the
Okabe-Ito palette, and no two series differ by color alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from learner.batch_metrics import Row
from learner.dashboard.text import printable
from learner.stats import EvalPoint
from learner.trackers import JsonlTracker

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_LABELS = 6
"""Evaluations that are labelled, the first and the last among them."""

Float64 = npt.NDArray[np.float64]

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#5F6368"


def plot_reward_curve(metrics_path: Path, png_path: Path, evals: Sequence[EvalPoint], *, max_staleness: int) -> None:
    """Draw the reward of every trained step with its running mean and the evaluations; below, staleness and its bound.

    Args:
        metrics_path: RUN/metrics.jsonl; the title is the run's name.
        png_path: what to write.
        evals: drawn where they were asked for, labelled with their versions.
        max_staleness: the bound.

    Raises:
        OSError: the disk refused.
    """
    from matplotlib.figure import Figure  # heavy, and only needed here

    rows = [row for row in JsonlTracker(metrics_path).rows() if not row["skipped"]]
    figure = Figure(figsize=(9, 5.6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    _title(figure, metrics_path.resolve().parent.name, rows)
    _plot_reward(top, rows, evals)
    _plot_staleness(bottom, rows, max_staleness)
    bottom.set_xlabel("step")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a run's name may hold glyphs the font lacks: boxes will do
        figure.savefig(png_path, format="png")


def _title(figure: Figure, name: str, rows: Sequence[Row]) -> None:
    steps = f"{len(rows)} step{'s' * (len(rows) != 1)}"
    wall_s = _column(rows, "wall_s")[-1] if rows else 0.0
    figure.suptitle(
        f"{printable(name, 60)}   {steps}, {wall_s:,.0f} s", x=0.012, ha="left", fontweight="bold", parse_math=False
    )


def _plot_reward(axes: Axes, rows: Sequence[Row], evals: Sequence[EvalPoint]) -> None:
    steps, rewards = _column(rows, "step"), _column(rows, "reward")
    window = max(3, min(20, len(rows) // 8))
    smooth = running_mean(rewards, window)
    axes.plot(steps, rewards, ".-", color=BLUE, alpha=0.35, lw=1, ms=5, label="reward of the step")
    axes.plot(steps, smooth, color=BLUE, lw=2.2, label=f"mean of {window} steps")
    if evals:
        x = [point.step for point in evals]
        y = [point.reward for point in evals]
        axes.plot(x, y, "D--", color=RED, lw=1.2, ms=6, mec="white", label="evaluation", zorder=3)
        _label(axes, [*evals[:-1][:: 1 + len(evals) // MAX_LABELS], evals[-1]], steps, smooth)
    axes.margins(y=0.22)
    axes.locator_params(axis="x", integer=True)
    _decorate(axes, "reward", loc="upper left")


def _label(axes: Axes, shown: Sequence[EvalPoint], steps: Float64, rewards: Float64) -> None:
    """Write score and versions at evaluations, on the side where the curve of the rewards is not."""
    from matplotlib.patheffects import withStroke

    for point in shown:
        below = steps.size > 0 and point.reward < np.interp(point.step, steps, rewards)
        axes.annotate(
            f"{point.reward:.2f}\n{point.label}",
            (point.step, point.reward),
            xytext=(0, -9 if below else 9),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
            color=RED,
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _plot_staleness(axes: Axes, rows: Sequence[Row], max_staleness: int) -> None:
    steps = _column(rows, "step")
    axes.bar(steps, _column(rows, "staleness/token_mean"), width=0.8, color=ORANGE, alpha=0.7, label="mean of tokens")
    axes.step(steps, _column(rows, "staleness/max"), where="mid", color=GREY, lw=2, label="oldest token")
    axes.axhline(max_staleness, color=RED, ls="--", lw=1.2, label="bound")
    axes.set_ylim(0, max(1, max_staleness) * 1.35)
    axes.locator_params(axis="y", integer=True, nbins=5)
    _decorate(axes, "staleness", ncols=3, loc="upper right")


def _decorate(axes: Axes, label: str, **legend: Any) -> None:
    axes.set_ylabel(label)
    axes.grid(visible=True, alpha=0.25, lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=True, framealpha=0.85, edgecolor="none", **legend)


def running_mean(values: Float64, window: int) -> Float64:
    """Return at each place the mean of the last `window` values that are finite; NaN where there is none. [n]."""
    finite = np.isfinite(values)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    number = counts[ends] - counts[starts]
    mean: Float64 = np.where(number > 0, (totals[ends] - totals[starts]) / np.maximum(1, number), np.nan)
    return mean


def _column(rows: Sequence[Row], name: str) -> Float64:
    return np.array([row[name] for row in rows], np.float64)
