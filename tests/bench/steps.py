"""A whole learner step by the head that computes the loss, against the head that runs twice: time and peak memory.

Model and groups are those of peers_groups.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.bench.harness import Figures, Row
from tests.bench.peers_groups import Shape
from tests.bench.peers_own import step_figures

SHAPES = {"16x64": Shape(16, 64), "64x512": Shape(64, 512)}
"""By completions and tokens of the prompt."""
TOKEN_BUDGET = 1024


@dataclass(frozen=True)
class Step:
    """Our trainer with some options."""

    shape: Shape
    options: tuple[tuple[str, Any], ...]

    def __call__(self, quick: bool) -> Figures:
        return step_figures(self.shape, quick=quick, token_budget=TOKEN_BUDGET, **dict(self.options))


RECOMPUTE = {name: Step(shape, (("loss_head", "recompute"),)) for name, shape in SHAPES.items()}


def _rows(group: str, name: str, control: str, time: float, peak: float, **options: Any) -> list[Row]:
    """Time and peak memory of a step with some options, against the head that runs twice."""
    ours = Step(SHAPES[group], tuple(options.items()))
    return [
        Row(
            name=f"step_{name}_{measure}_{group}",
            control=control,
            ours=ours,
            baseline=RECOMPUTE[group],
            ratio="ours/baseline",
            target=target,
            sense="lower",
            unit=unit,
            figure=figure,
            contest=f"{name}_{group}",
        )
        for measure, target, unit, figure in (
            ("time", time, "CPU s a step", "cpu_s"),
            ("peak", peak, "MiB over base", "peak_mib"),
        )
    ]


ROWS = [
    *(
        row
        for group in SHAPES
        for row in _rows(group, "fused_head", "head that runs twice", 1.0, 1.05, loss_head="fused")
    ),
    *_rows("64x512", "checkpointed", "activations kept, head twice", 1.4, 0.9, gradient_checkpointing=True),
]
