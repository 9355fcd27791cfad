"""headway-learner tune: what to set the dial to, and which side to grow, from a recorded run or declared costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field

from learner.tuning.command import Forecasting, read_command
from learner.tuning.planner import Candidate, Plan, plan, read_vary

BAR = 24
"""Characters of the longest bar."""
BLUE, ORANGE = "#0072B2", "#E69F00"


class TuneCommand(Forecasting):
    """Forecast every setting in question; name the knee, the least stale that trains nearly as much as the best."""

    vary: list[str] = Field(default_factory=lambda: ["max_staleness=0,1,2,3,4,6,8"])
    """NAME=VALUE,VALUE...: max_staleness, reorder_window, weight_sync_steps, num_generations, prompts_per_step, or
    split (trainers:servers, training taken to be as many times as fast). All combinations are simulated."""
    plot: Path | None = None
    """Draw trained tokens/s over mean staleness into this PNG."""


def tune_command(argv: Sequence[str], *, prog: str) -> int:
    """Run the command and return its exit code.

    Args:
        argv: an optional RUN_DIR, then flags, which take the place of what the run was like.
        prog: for --help.

    Raises:
        ConfigError: a wrong flag, nothing that can progress, a run directory with too little in it.
    """
    command, workload = read_command(TuneCommand, argv, prog=prog)
    found = plan(
        workload, command.dial, read_vary(command.vary), steps=command.steps, warmup_steps=command.warmup_steps
    )
    print(msgspec.json.encode(as_dict(found)).decode() if command.as_json else table(found))
    if command.plot is not None:
        draw(found, command.plot)
    return 0


def as_dict(found: Plan) -> dict[str, Any]:
    """For JSON."""
    return {
        "candidates": [dict(one.words) | one.forecast.as_dict() for one in found.candidates],
        "refused": found.refused, "best": found.best.name, "knee": found.knee.name, "advice": found.advice,
    }  # fmt: skip


def table(found: Plan) -> str:
    """Show a plan to people."""
    most, width = found.best.forecast.trained_tokens_s, max(len(one.name) for one in found.candidates)
    head = f"{'':<{width}}  {'step':>8} {'tokens/s':>10} {'learner idle':>12} {'rollout idle':>12} {'staleness':>14}"
    lines = [head]
    for one in found.candidates:
        forecast, mark = one.forecast, "  <- knee" if one is found.knee else ""
        stale = f"{forecast.staleness_mean:.2f}, max {forecast.staleness_max}"
        bar = "#" * round(BAR * forecast.trained_tokens_s / most)
        lines.append(
            f"{one.name:<{width}}  {forecast.step_s:>6.3g} s {forecast.trained_tokens_s:>10,.0f}"
            f" {forecast.learner_idle:>12.1%} {forecast.rollout_idle:>12.1%} {stale:>14}  {bar}{mark}"
        )
    lines += [f"refused: {reason}" for reason in found.refused]
    return "\n".join([*lines, "", f"knee: {found.knee.name}. {found.advice}"])


def draw(found: Plan, path: Path) -> None:
    """Draw the curve.

    Raises:
        OSError: the disk refused.
    """
    from matplotlib.figure import Figure  # heavy, and only needed here

    def point(one: Candidate) -> tuple[float, float]:
        return one.forecast.staleness_mean, one.forecast.trained_tokens_s

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    ordered = sorted(found.candidates, key=point)
    axes.plot(*zip(*map(point, ordered), strict=True), marker="o", color=BLUE)
    axes.plot(*point(found.knee), marker="D", markersize=12, fillstyle="none", color=ORANGE, linestyle="none")
    axes.annotate(f"knee: {found.knee.name}", point(found.knee), textcoords="offset points", xytext=(8, -16))
    axes.set_xlabel("mean staleness of trained tokens (steps)")
    axes.set_ylabel("trained tokens/s")
    axes.set_ylim(bottom=0)
    figure.savefig(path, format="png")
