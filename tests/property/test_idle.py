"""Idle time: causes sum to the whole, each moment has the cause that held, and which that is."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from learner.idle import (
    EMPTY_SEATS,
    LEARNER_WAITS,
    IdleTime,
    LearnerWaits,
    NotLeased,
    Situation,
    describe,
    split,
    why_learner_waits,
    why_not_leased,
)
from rollout_server.seats import EmptyBecause, SeatMeter, why_empty

TIMES = st.fractions(0, 10, max_denominator=7)


@given(st.lists(st.tuples(TIMES, st.sampled_from([None, *LearnerWaits]), st.booleans())))
def test_causes_sum_to_the_time_in_which_there_was_one(
    events: list[tuple[Fraction, LearnerWaits | None, bool]],
) -> None:
    idle, now = IdleTime[LearnerWaits](Fraction(0)), Fraction(0)
    expected = dict.fromkeys(LearnerWaits, Fraction(0))
    found = dict.fromkeys(LearnerWaits, Fraction(0))
    holding: LearnerWaits | None = None
    for elapsed, cause, take in events:
        now += elapsed
        if holding is not None:
            expected[holding] += elapsed
        if take:
            for name, seconds in idle.take(now).items():
                found[name] += seconds
        idle.switch(cause, now)
        holding = cause
    for name, seconds in idle.take(now).items():
        found[name] += seconds
    assert found == expected


@given(st.lists(st.tuples(TIMES, TIMES, st.sampled_from(EmptyBecause))))
def test_empty_seats_only_grow_and_sum_to_wall_time_less_occupancy(
    events: list[tuple[Fraction, Fraction, EmptyBecause]],
) -> None:
    """Also where an engine counts a step's occupancy when it ends: then more may come than time has passed."""
    meter, wall, occupancy, holding = SeatMeter(), Fraction(0), Fraction(0), EmptyBecause.WEIGHTS
    meter.empty_s = dict.fromkeys(EmptyBecause, Fraction(0))
    meter._settled_s = Fraction(0)
    most_empty = Fraction(0)
    for elapsed, occupied, cause in events:
        wall, occupancy = wall + elapsed, occupancy + occupied
        before = dict(meter.empty_s)
        meter.settle(wall_s=wall, occupancy_s=occupancy, cause=cause)
        grown = max(Fraction(0), wall - occupancy - most_empty)
        most_empty += grown
        assert meter.empty_s == before | {holding: before[holding] + grown}
        assert sum(meter.empty_s.values()) == most_empty
        holding = cause


@given(st.fractions(0, 100), st.dictionaries(st.sampled_from(NotLeased), st.fractions(0, 9), min_size=1))
def test_a_split_sums_to_what_is_split(seconds: Fraction, shares: dict[NotLeased, Fraction]) -> None:
    parts = split(seconds, shares)
    assert sum(parts.values()) == (seconds if sum(shares.values()) else 0)
    assert all(parts[cause] == 0 for cause in parts if shares[cause] == 0)


def test_the_engine_says_why_seats_are_empty():
    quiet: dict[str, Any] = {"live": True, "samples_waiting": 0, "groups_in_flight": 0, "groups_scoring": 0}
    assert why_empty(**quiet) is EmptyBecause.LEASE
    assert why_empty(**quiet | {"live": False, "samples_waiting": 3}) is EmptyBecause.WEIGHTS
    assert why_empty(**quiet | {"samples_waiting": 3}) is EmptyBecause.ENGINE
    assert why_empty(**quiet | {"groups_in_flight": 2, "groups_scoring": 2}) is EmptyBecause.REWARDS
    assert why_empty(**quiet | {"groups_in_flight": 2, "groups_scoring": 1}) is EmptyBecause.LEASE, "one still samples"


def situation(**changes: Any) -> Situation:
    """Servers sample as fast as they can, everything is leased."""
    fields = {
        "prompts_per_step": 4, "servers": 1, "healthy": 1, "seats": 16, "seats_taken": 16, "free_slots": False,
        "rows_ready": True, "unplaced": False, "admissible": True, "arriving": 0, "buffered": 1, "filtered": 0,
        "evaluating": False, "pinned": False,
    }  # fmt: skip
    return Situation(**{**fields, **changes})


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, LearnerWaits.ROLLOUTS),
        ({"servers": 0, "healthy": 0}, LearnerWaits.NO_SERVER),
        ({"healthy": 0}, LearnerWaits.WEIGHTS),
        ({"unplaced": True, "admissible": False}, LearnerWaits.WEIGHTS),
        ({"seats_taken": 3}, LearnerWaits.BOUND),
        ({"seats_taken": 3, "unplaced": True}, LearnerWaits.ROLLOUTS),
        ({"buffered": 4, "seats_taken": 3}, LearnerWaits.STRAGGLER),
        ({"buffered": 2, "arriving": 2}, LearnerWaits.DISK),
        ({"buffered": 2, "arriving": 1}, LearnerWaits.ROLLOUTS),
        ({"filtered": 3, "seats_taken": 3}, LearnerWaits.FILTERED),
        ({"filtered": 2, "seats_taken": 3}, LearnerWaits.BOUND),
        ({"free_slots": True, "rows_ready": False, "seats_taken": 3}, LearnerWaits.DATA),
        ({"evaluating": True}, LearnerWaits.EVALUATION),
        ({"evaluating": True, "seats_taken": 3}, LearnerWaits.BOUND),
        ({"evaluating": True, "pinned": True, "seats_taken": 3}, LearnerWaits.EVALUATION),
    ],
)
def test_why_the_learner_waits(changes: dict[str, Any], cause: LearnerWaits) -> None:
    assert why_learner_waits(situation(**changes)) is cause


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({}, NotLeased.BOUND),
        ({"free_slots": True}, NotLeased.DATA),
        ({"unplaced": True}, NotLeased.SENT),
        ({"unplaced": True, "admissible": False}, NotLeased.WEIGHTS),
        ({"unplaced": True, "admissible": False, "pinned": True}, NotLeased.EVALUATION),
        ({"unplaced": True, "training": False}, NotLeased.NO_TRAINING),
    ],
)
def test_why_nothing_more_is_leased(changes: dict[str, bool], cause: NotLeased) -> None:
    usual = {"training": True, "unplaced": False, "admissible": True, "pinned": False, "free_slots": False}
    assert why_not_leased(**usual | changes) is cause


def test_every_cause_has_words():
    assert set(LEARNER_WAITS) == set(LearnerWaits)
    assert {f"rollout/lease_{cause}_s" for cause in NotLeased} < set(EMPTY_SEATS)
    seconds = {LearnerWaits.ROLLOUTS: 3.0, LearnerWaits.BOUND: 5.0, LearnerWaits.DISK: 1.0}
    assert describe(seconds, LEARNER_WAITS, whole_s=20.0) == (
        "the bound 25 %: raise max_staleness; rollouts too slow 15 %: add servers"
    )
