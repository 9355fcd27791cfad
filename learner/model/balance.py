"""Which sequences go into which row, and which rows to which rank. Pure: numbers in, lists of indices out.

Two problems that look alike and are not. Rows have a hard limit (the token budget) and should be few: bin packing, by
first-fit decreasing (at most 11/9 of the fewest bins + 2/3; Dósa 2007). Ranks are given, and the one with most work is
waited for by all others: multiprocessor scheduling, by longest processing time first (at most 4/3 of the best; Graham
1969), followed by exchanges between the heaviest and the lightest rank, which matter where items are few.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BALANCED = 1e-3
"""Heaviest over mean rank, less 1: better than that is not looked for, timings spread more."""
MAX_EXCHANGES = 64


def pack(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Put sequences into as few rows of at most `token_budget` tokens as first-fit decreasing finds.

    Args:
        lengths: [N] tokens of each sequence. One longer than the budget gets a row to itself.
        token_budget: tokens per row.

    Returns:
        The rows, each with its sequences in ascending order, in the order of their first sequences.
    """
    # First-fit decreasing fills its first bin with the largest that fits, again and again, then the second: bin by
    # bin that is one search in a sorted list per sequence.
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in order]
    rows = []
    while sizes:
        room, row = token_budget - sizes.pop(), [order.pop()]
        while place := bisect.bisect_right(sizes, room):
            room -= sizes.pop(place - 1)
            row.append(order.pop(place - 1))
        rows.append(sorted(row))
    return sorted(rows)


def balance(costs: Sequence[float], num_ranks: int) -> list[list[int]]:
    """Share items among ranks so that the heaviest rank is as light as it can easily be made.

    Args:
        costs: [N] of each item, > 0, in any unit.
        num_ranks: of them; with fewer items than ranks some stay empty.

    Returns:
        [num_ranks] lists of indices, each ascending. Never worse than longest processing time first.
    """
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [(0.0, rank) for rank in range(num_ranks)]
    for item in sorted(range(len(costs)), key=costs.__getitem__, reverse=True):
        load, rank = loads[0]
        ranks[rank].append(item)
        heapq.heapreplace(loads, (load + costs[item], rank))
    _exchange(ranks, np.asarray(costs, np.float64))
    return [sorted(items) for items in ranks]


def _exchange(ranks: list[list[int]], costs: npt.NDArray[np.float64]) -> None:
    """Move an item from the heaviest to the lightest rank, or swap two, while that helps."""
    loads = np.array([costs[items].sum() for items in ranks])
    for _ in range(MAX_EXCHANGES):
        heavy, light = int(loads.argmax()), int(loads.argmin())
        gap = loads[heavy] - loads[light]
        if gap <= BALANCED * loads.mean():
            return
        given = costs[ranks[heavy]]
        taken = np.append(costs[ranks[light]], 0.0)  # the last: nothing in return
        shift = given[:, None] - taken
        left = np.abs(gap - 2 * shift)  # the gap afterwards
        i, j = np.unravel_index(left.argmin(), left.shape)
        if left[i, j] >= gap * (1 - 1e-9):
            return
        item = ranks[heavy].pop(int(i))
        if j < len(ranks[light]):
            ranks[heavy].append(ranks[light].pop(int(j)))
        ranks[light].append(item)
        loads[heavy] -= shift[i, j]
        loads[light] += shift[i, j]
