"""Give pieces of work to ranks so that all are done at about the same time. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Sequence


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Share out the pieces, the costliest first, each to the rank that has least to do (LPT; Graham 1969, theorem 2).

    The busiest rank has at most 4/3 - 1/(3 num_ranks) of what the best possible division gives it. The same costs
    always give the same answer.

    Returns:
        Per rank the indices of its pieces, in order.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return [sorted(share) for share in shares]
