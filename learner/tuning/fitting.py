"""What a decode step costs, from what a recorded run's engines did in all.

Engines say how long they decoded (B), the seat-seconds that samples took (S') and the tokens drawn (T). With N decode
steps of b samples, each t(b) = t0 + k b long (k = t0 c / M), and S the seat-seconds of decode steps alone, without
those of standing still for weights,

    B = sum t(b)   = t0 N + k T         S = sum b t(b) = t0 T + k sum b^2

Two equations for t0 and k, once N / T, sum b^2 / T and S / S' are known: how full the seats were, step by step, which
no engine says. The simulator does, at the dial and with the lengths and costs of that run; what it says hardly depends
on t0 and k, so that a few rounds suffice, wherever they start. With seats that are always equally full the equations
are one and the same, and nothing can be told.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

ROUNDS = 3
LEAST_SPREAD = 0.02
"""Variance of the batch size over its squared mean, over decode steps: with less, noise would be fitted."""
LEAST_BASE = 0.02
"""Of a step's seconds, t0 at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What the engines of a run did in all."""

    busy_s: float
    """B"""
    seat_s: float
    """S'"""
    tokens: float
    """T"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fullness:
    """How full the seats were."""

    decoding_share: float
    """S / S'"""
    steps_per_token: float
    """N / T"""
    mean_batch: float
    """sum b^2 / T: samples in the decode step of a token, on average."""


def fit_decoding(
    decoded: Decoded, *, room: int, simulated: Callable[[float, float], Fullness]
) -> tuple[float, float, bool]:
    """Return t0 in seconds, c, and whether anything told them apart; if not, c is 0.

    Args:
        decoded: by the run's engines.
        room: M, of each.
        simulated: called with t0 and c; the fullness that the run would have had with them.
    """
    found = decoded.seat_s / decoded.tokens / 2, 1.0
    for _ in range(ROUNDS):
        fullness = simulated(*found)
        solved = solve(decoded, fullness)
        if solved is None:
            return fullness.decoding_share * decoded.seat_s / decoded.tokens, 0.0, False
        base_s, each_s = solved
        found = base_s, each_s * room / base_s
    return *found, True


def solve(decoded: Decoded, fullness: Fullness) -> tuple[float, float] | None:
    """Return t0 > 0 and k >= 0, both in seconds, or None."""
    token_s, step_s = decoded.busy_s / decoded.tokens, fullness.decoding_share * decoded.seat_s / decoded.tokens
    spread = fullness.steps_per_token * fullness.mean_batch - 1
    if spread < LEAST_SPREAD:
        return None
    base_s = (fullness.mean_batch * token_s - step_s) / spread
    base_s = max(base_s, LEAST_BASE * step_s)
    each_s = token_s - base_s * fullness.steps_per_token
    return (base_s, each_s) if each_s >= 0 else (token_s / fullness.steps_per_token, 0.0)
