"""Rows that are full and ranks that are alike, for 4096 sequences of lengths as rollouts have them.

Lengths are lognormal(400, 1.0), 16 to 4096 tokens, rows hold 8192; a sequence costs what TokenCost says of a 1.7B
Qwen3. What is asserted in every round: fill >= 0.97, heaviest over mean rank <= 1.01, and both within 5 ms of CPU.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable

from tests.bench.harness import Row

NUM_SEQUENCES, TOKEN_BUDGET, NUM_RANKS = 4096, 8192, 8
LIMIT_MS = 5.0


def sequence_lengths() -> list[int]:
    import numpy as np

    drawn = np.random.default_rng(0).lognormal(np.log(400), 1.0, NUM_SEQUENCES)
    return np.clip(drawn, 16, 4096).astype(int).tolist()


def sequence_costs() -> list[float]:
    import numpy as np

    from learner.model.shares import TokenCost

    cost = TokenCost(layers=2 * 1.4e9, head=2 * 2048 * 151_936, attention=4 * 28 * 16 * 128)
    prompt_N, length_N = np.full(NUM_SEQUENCES, 256), np.array(sequence_lengths())
    return (cost.prompts(prompt_N) + cost.completions(prompt_N, length_N)).tolist()


def fill(rows: list[list[int]]) -> float:
    return sum(sequence_lengths()) / (len(rows) * TOKEN_BUDGET)


def packed_fill(quick: bool) -> float:
    from learner.model.balance import pack

    lengths = sequence_lengths()
    rows = pack(lengths, TOKEN_BUDGET)
    assert fill(rows) >= 0.97, f"fill {fill(rows):.4f}"
    assert (ms := best_ms(lambda: pack(lengths, TOKEN_BUDGET))) <= LIMIT_MS, f"{ms:.2f} ms"
    return fill(rows)


def first_fit_fill(quick: bool) -> float:
    """In the order they come, each sequence into the first row with room for it."""
    room: list[int] = []
    rows: list[list[int]] = []
    for i, length in enumerate(sequence_lengths()):
        place = next((place for place, left in enumerate(room) if left >= length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            room.append(TOKEN_BUDGET)
        rows[place].append(i)
        room[place] -= length
    return fill(rows)


def heaviest_over_mean(loads: list[float]) -> float:
    return max(loads) * len(loads) / sum(loads)


def balanced(quick: bool) -> float:
    from learner.model.balance import balance

    costs = sequence_costs()
    result = heaviest_over_mean([sum(costs[i] for i in items) for items in balance(costs, NUM_RANKS)])
    assert result <= 1.01, f"heaviest over mean {result:.4f}"
    assert (ms := best_ms(lambda: balance(costs, NUM_RANKS))) <= LIMIT_MS, f"{ms:.2f} ms"
    return result


def longest_first(quick: bool) -> float:
    loads = [0.0] * NUM_RANKS
    for cost in sorted(sequence_costs(), reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return heaviest_over_mean(loads)


def best_ms(function: Callable[[], object]) -> float:
    def once() -> float:
        started_s = time.process_time()
        function()
        return 1e3 * (time.process_time() - started_s)

    return min(once() for _ in range(20))


ROWS = [
    Row(
        name="packing_fill", control="first-fit", ours=packed_fill, baseline=first_fit_fill,
        ratio="ours/baseline", target=1.0, sense="higher", unit="of the token budget",
    ),
    Row(
        name="balance_8_ranks", control="longest first", ours=balanced, baseline=longest_first,
        ratio="ours/baseline", target=1.0, sense="lower", unit="heaviest / mean rank",
    ),
]  # fmt: skip
