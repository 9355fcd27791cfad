"""Work for ranks: all of it, once, and nobody far above the others."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from learner.model.balance import balance

COSTS = st.lists(st.floats(0.0, 1e6), max_size=60)


@given(COSTS, st.integers(1, 9))
def test_every_piece_goes_to_one_rank(costs, num_ranks):
    shares = balance(costs, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(index for share in shares for index in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)


@given(COSTS, st.integers(1, 9))
def test_no_rank_is_above_the_others_by_more_than_one_piece(costs, num_ranks):
    loads = [
        (sum(costs[i] for i in share), min((costs[i] for i in share), default=0.0))
        for share in balance(costs, num_ranks)
    ]
    least = min(load for load, _ in loads)
    assert all(load - smallest <= least + 1e-6 * max(costs, default=0.0) for load, smallest in loads)


def test_the_costliest_first():
    assert balance([1.0, 1.0, 2.0, 4.0], 2) == [[3], [0, 1, 2]]
