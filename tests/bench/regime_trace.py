"""What the runs of a regime sample: completion lengths drawn once, and the speeds at which both sides deal with them.

A regime is a kind of lengths and a number of seats. Lengths are lognormal with a median of MEDIAN tokens, cut; only
ratios count, so tokens are few and slow. A decode step with b seats taken is token_s (1 + b / seats) long; training
takes as long for a token as an engine whose seats are all taken, so that neither side is the slower one.

    python -m tests.bench.regime_trace    writes the traces of regime A, which are kept in lengths/
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from protocol.length_trace import LengthTrace, read_length_trace, write_length_trace

PROMPTS_PER_STEP, NUM_GENERATIONS = 16, 16
SEEDS = 3
WARM_UP_STEPS = 15
STEPS, QUICK_STEPS = 200, 40
STEP_S = 0.8
"""Mean seconds of training a step, and of generating it with every seat taken. The processes' own work is some 50 ms of
CPU a step and side: they must not be what is measured."""
NUM_GROUPS = PROMPTS_PER_STEP * (WARM_UP_STEPS + STEPS + 8)
"""Some steps more than a run trains: it is ahead when it ends."""
MEDIAN = 20
KEPT = Path(__file__).parent / "lengths"


@dataclass(frozen=True, slots=True, kw_only=True)
class Regime:
    """A kind of lengths, and how many samples are decoded at once."""

    name: str
    tail: float
    """p99 / p50 of the lengths before the cut."""
    cut: float
    """Longest, in medians."""
    seats: int
    kept: bool = False
    """Whether the traces are files of the repository."""

    def path(self, seed: int) -> Path:
        """Where its trace is kept."""
        return KEPT / f"{self.name}-{seed}.lengths"

    def trace(self, seed: int) -> LengthTrace:
        """Its lengths under a seed: read where they are kept, else drawn."""
        return read_length_trace(self.path(seed)) if self.kept else draw(self, seed)


A = Regime(name="a", tail=10, cut=10, seats=85, kept=True)
B = Regime(name="b", tail=10, cut=20, seats=64)
C = Regime(name="c", tail=1.1, cut=20, seats=85)
REGIMES = {regime.name: regime for regime in (A, B, C)}


@dataclass(frozen=True, slots=True)
class Speeds:
    """Of both sides, in seconds a token."""

    token_s: float
    """A decode step of a single sample; with all seats taken it is twice that."""
    train_token_s: float

    @staticmethod
    def of(regime: Regime, trace: LengthTrace) -> Speeds:
        """Make a mean step of the trace take STEP_S on either side."""
        train_token_s = STEP_S / (PROMPTS_PER_STEP * NUM_GENERATIONS * float(trace.lengths.mean()))
        return Speeds(train_token_s * regime.seats / 2, train_token_s)


def draw(regime: Regime, seed: int) -> LengthTrace:
    """Draw a trace."""
    sigma = math.log(regime.tail) / NormalDist().inv_cdf(0.99)
    deviates = np.random.default_rng(seed).standard_normal((NUM_GROUPS, NUM_GENERATIONS))
    lengths = np.clip(np.rint(MEDIAN * np.exp(sigma * deviates)), 1, MEDIAN * regime.cut).astype(np.int32)
    origin = {"median": float(MEDIAN), "p99_over_p50": float(regime.tail), "cut_in_medians": float(regime.cut)}
    return LengthTrace(seed, lengths, origin)


def step_tokens(trace: LengthTrace, steps: int) -> float:
    """Mean tokens of a step of those that are measured, its groups being taken in the order of their ordinals."""
    first, last = PROMPTS_PER_STEP * WARM_UP_STEPS, PROMPTS_PER_STEP * (WARM_UP_STEPS + steps)
    return float(trace.lengths[first:last].sum()) / steps


def main() -> None:
    KEPT.mkdir(exist_ok=True)
    for seed in range(SEEDS):
        write_length_trace(A.path(seed), draw(A, seed))


if __name__ == "__main__":
    main()
