"""Lengths to simulate with, and the length of each completion that a simulated lease asks for."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from protocol.length_trace import LengthTrace
from protocol.messages import Int32


def lognormal_trace(
    *,
    num_groups: int,
    num_generations: int,
    median: float,
    p99_over_p50: float,
    max_completion_length: int,
    seed: int,
) -> LengthTrace:
    """Draw lengths from a lognormal distribution, cut at max_completion_length as an engine cuts them.

    Args:
        num_groups: rows.
        num_generations: completions of each.
        median: tokens, before the cut.
        p99_over_p50: 99th percentile over the median, before the cut; 1 makes all lengths equal.
        max_completion_length: tokens.
        seed: of the draws.
    """
    sigma = math.log(p99_over_p50) / NormalDist().inv_cdf(0.99)
    deviates = np.random.default_rng(seed).standard_normal((num_groups, num_generations))
    lengths = np.clip(np.rint(median * np.exp(sigma * deviates)), 1, max_completion_length).astype(np.int32)
    cut = max_completion_length / median
    return LengthTrace(seed, lengths, {"median": median, "p99_over_p50": p99_over_p50, "cut_in_medians": cut})


def group_lengths(trace: LengthTrace, ordinal: int, num_generations: int) -> Int32:
    """Return the tokens of each completion of a group, [num_generations].

    After the trace's last group comes the first again. Where a group has fewer completions than are asked for, they are
    repeated: its tail is then that of the smaller group.
    """
    row_G: Int32 = trace.lengths[ordinal % len(trace.lengths)]
    return row_G[:num_generations] if num_generations <= row_G.size else np.resize(row_G, num_generations)
