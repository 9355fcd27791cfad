"""What running ahead buys where lengths have tails: speed over synchronous, idle time, and what the simulator foretold.

A server process and a learner process, shipped loops and real sockets; only engine time and `forward_backward` are
slept (regime_run.py). All modes of a round play the same lengths, each round those of another seed:

    A  p99 / p50 = 10, cut at p99, 85 seats    B  the same, cut at 20 medians, 64 seats    C  p99 / p50 = 1.1, 85 seats

In every run training takes as long as generation with all seats taken, and weights are live 2 % of a step after it at
most; a run of which that is not so, that breaks the bound, loses a group, or is the synchronous one and 5 % off its own
simulation, is void: every row that needs it misses and says so. The whole takes two hours (A 70 minutes, B 35, C 29).

Seen on two cores (2026-11-30), three seeds of 200 steps of 0.8 s, medians; no run void, no group older than the bound:

    A over synchronous at 1, 2, 3, 4    1.72, 2.38, 2.74, 2.75 (1.6, 2.1, 2.45, 2.55)    beside B and C
    A against its simulation            1.01, 1.00, 1.01, 1.01 (within 0.05)             alone, some editing beside
    A at 4: of the roofline, idle       0.985 (0.92), 0.04 % (3 %)                       likewise
    B at 4: over synchronous, idle      2.86 (2.5), 0.26 % (5 %)                         beside A
    C at 4: of the longer side          1.01 (1.05); over synchronous 2.15 (1.9)         beside A

Weights were live 9 to 15 ms after the optimizer's step in the runs that were looked at. It was 16 to 28 ms, and every
run void, while the learner recorded a step on the event loop right after the snapshot had begun; rows are written once
weights are live now.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.bench.harness import Figures, Row, round_number
from tests.bench.regime_trace import SEEDS, A, B, C, Regime

MOST_OFF = 0.05
"""Of a measured step from the simulated one."""
LIMIT_S = 900.0
"""Of a run: a synchronous one takes some 500 s."""
LIVE = 0.02
"""Of a step, until weights are live in a simulated run: the most that a measured one may take."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A run of both processes."""

    regime: Regime
    max_staleness: int
    __module__ = __name__

    def __call__(self, quick: bool) -> Figures:
        from tests.bench.regime_run import predict_step_s, run_regime

        outcome = run_regime(self.regime, round_number(), self.max_staleness, quick=quick)
        if self.max_staleness == 0:
            predicted_s = predict_step_s(self.regime, round_number(), 0, live_s=outcome.live_s, quick=quick)
            off = outcome.step_s / predicted_s - 1
            assert abs(off) <= MOST_OFF, f"void: the synchronous run took {off:+.1%} of what is simulated"
        return {"step_s": outcome.step_s, "idle": outcome.idle_s / outcome.step_s}


@dataclass(frozen=True, slots=True)
class Predicted:
    """The same run, simulated."""

    regime: Regime
    max_staleness: int
    __module__ = __name__

    def __call__(self, quick: bool) -> Figures:
        from tests.bench.regime_run import predict_step_s
        from tests.bench.regime_trace import STEP_S

        live_s = LIVE * STEP_S
        return {"step_s": predict_step_s(self.regime, round_number(), self.max_staleness, live_s=live_s, quick=quick)}


@dataclass(frozen=True, slots=True)
class Roofline:
    """max(all training, all tokens at full seats): the two take equally long."""

    regime: Regime
    __module__ = __name__

    def __call__(self, quick: bool) -> Figures:
        from tests.bench.regime_run import num_steps
        from tests.bench.regime_trace import Speeds, step_tokens

        trace = self.regime.trace(round_number())
        step_s = step_tokens(trace, num_steps(quick)) * Speeds.of(self.regime, trace).train_token_s
        return {"step_s": step_s, "idle": 1.0}


MODES = {(regime, depth): Measured(regime, depth) for regime in (A, B, C) for depth in range(5)}
ROOFLINES = {regime: Roofline(regime) for regime in (A, B, C)}


def row(regime: Regime, what: str, depth: int, **fields: Any) -> Row:
    """Fill in what all rows of a regime have in common."""
    words = {"figure": "step_s", "unit": "s a step", "ours": MODES[regime, depth]} | fields
    return Row(
        name=f"regime_{regime.name}_{what}", contest=f"regime_{regime.name}", rounds=SEEDS, quick_rounds=1,
        timeout_s=LIMIT_S, **words,
    )  # fmt: skip


def speed_row(regime: Regime, depth: int, target: float) -> Row:
    return row(
        regime, f"speed_{depth}", depth, control="max_staleness 0, same lengths", baseline=MODES[regime, 0],
        ratio="baseline/ours", target=target,
    )  # fmt: skip


def prediction_row(regime: Regime, depth: int) -> Row:
    return row(
        regime, f"prediction_{depth}", depth, control="headway-learner simulate", baseline=Predicted(regime, depth),
        ratio="ours/baseline", target=MOST_OFF, sense="near",
    )  # fmt: skip


def roofline_row(regime: Regime, target: float, *, slowdown: bool) -> Row:
    """Compare with the roofline: as a share of its speed, or as a multiple of its time."""
    return row(
        regime, "roofline", 4, control="max(generation, training)", baseline=ROOFLINES[regime], target=target,
        ratio="ours/baseline" if slowdown else "baseline/ours", sense="lower" if slowdown else "higher",
    )  # fmt: skip


def idle_row(regime: Regime, target: float) -> Row:
    return row(
        regime, "idle", 4, control="all of the time, max_staleness 4", baseline=ROOFLINES[regime], target=target,
        ratio="ours/baseline", sense="lower", unit="of the time", figure="idle",
    )  # fmt: skip


ROWS = [
    *(speed_row(A, depth, target) for depth, target in ((1, 1.6), (2, 2.1), (3, 2.45), (4, 2.55))),
    *(prediction_row(A, depth) for depth in (1, 2, 3, 4)),
    roofline_row(A, 0.92, slowdown=False),
    idle_row(A, 0.03),
    speed_row(B, 4, 2.5),
    idle_row(B, 0.05),
    roofline_row(C, 1.05, slowdown=True),
    speed_row(C, 4, 1.9),
]
