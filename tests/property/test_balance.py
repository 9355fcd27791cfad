"""Rows within the budget and few, ranks alike: for any lengths and costs."""

from __future__ import annotations

import heapq
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from learner.model.balance import balance, pack
from learner.model.shares import TokenCost

lengths = st.lists(st.integers(0, 120), max_size=40)
costs = st.lists(st.floats(0.01, 100.0), max_size=40)


@given(lengths=lengths, token_budget=st.integers(1, 200))
def test_every_sequence_is_in_one_row_within_the_budget(lengths, token_budget):
    rows = pack(lengths, token_budget)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= token_budget or len(row) == 1 for row in rows)
    assert rows == sorted(sorted(row) for row in rows)


@given(lengths=lengths, token_budget=st.integers(120, 200))
def test_no_more_rows_than_first_fit_decreasing_may_need(lengths, token_budget):
    rows = pack(lengths, token_budget)
    assert len(rows) == len(first_fit(sorted(lengths, reverse=True), token_budget))
    fullest = sorted((sum(lengths[i] for i in row) for row in rows), reverse=True)
    assert all(a + b > token_budget for a, b in itertools.pairwise(fullest))  # no two rows could be one


def first_fit(lengths: list[int], token_budget: int) -> list[list[int]]:
    """By the book: every sequence into the first row that has room."""
    rows: list[list[int]] = []
    for length in lengths:
        row = next((row for row in rows if sum(row) + length <= token_budget), None)
        if row is None:
            rows.append(row := [])
        row.append(length)
    return rows


def longest_first(costs: list[float], num_ranks: int) -> list[float]:
    loads = [0.0] * num_ranks
    for cost in sorted(costs, reverse=True):
        heapq.heapreplace(loads, loads[0] + cost)
    return loads


@given(costs=costs, num_ranks=st.integers(1, 9))
def test_every_item_has_one_rank_and_none_waits_longer_than_after_longest_first(costs, num_ranks):
    ranks = balance(costs, num_ranks)
    assert len(ranks) == num_ranks
    assert sorted(itertools.chain(*ranks)) == list(range(len(costs)))
    assert all(items == sorted(items) for items in ranks)
    assert all(ranks) or len(costs) < num_ranks
    heaviest = max(sum(costs[i] for i in items) for items in ranks)
    assert heaviest <= max(longest_first(costs, num_ranks)) * (1 + 1e-9)


@settings(max_examples=50)
@given(costs=st.lists(st.floats(0.01, 100.0), min_size=1, max_size=8))
def test_close_to_the_best_there_is(costs):
    best = min(
        max(sum(c for c, r in zip(costs, ranks, strict=True) if r == rank) for rank in range(2))
        for ranks in itertools.product(range(2), repeat=len(costs))
    )
    heaviest = max(sum(costs[i] for i in items) for items in balance(costs, 2))
    assert heaviest <= best * (7 / 6) + 1e-6  # Graham's bound for two ranks


def test_exchanges_repair_what_longest_first_gets_wrong():
    costs = [3.0, 3.0, 2.0, 2.0, 2.0]
    assert max(longest_first(costs, 2)) == 7.0
    assert max(sum(costs[i] for i in items) for items in balance(costs, 2)) == 6.0


def test_the_same_costs_give_the_same_ranks():
    costs = [float(i * 7 % 13 + 1) for i in range(50)]
    assert balance(costs, 4) == balance(list(costs), 4)


@given(prompt=st.integers(1, 20), length=st.integers(1, 12))
def test_the_cost_counts_who_sees_whom(prompt, length):
    cost = TokenCost(layers=2.0, attention=0.5, head=30.0)
    own = 2.0 * (length - 1) + 30.0 * length + 0.5 * sum(prompt + i + 1 for i in range(length - 1))
    assert cost.completions(np.array([prompt]), np.array([length])).tolist() == pytest.approx([own])
    assert cost.prompts(np.array([prompt])).tolist() == pytest.approx([2.0 * prompt + 0.5 * sum(range(1, prompt + 1))])
