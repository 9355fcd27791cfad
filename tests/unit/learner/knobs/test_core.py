"""The knobs: what may be set, what is said when it may not, and that values follow from the records alone."""

from __future__ import annotations

from typing import Any

import pytest

from learner.knobs.core import Knob, KnobRefused, Knobs, joined_history, knob_ranges
from learner.ledger import Ledger
from learner.staleness import Bounds, derive_bounds
from protocol.errors import InvariantViolation


def bounds(max_staleness: int = 3, sync_steps: int = 1) -> Bounds:
    return derive_bounds(max_staleness=max_staleness, prompts_per_step=2, weight_sync_steps=sync_steps)


def make_knobs(*history: Any, learning_rate: float = 1e-5, **options: Any) -> Knobs:
    return Knobs(knob_ranges(bounds(**options), num_generations=4, learning_rate=learning_rate), history)


def turn(knobs: Knobs, name: str, value: float, step: int = 0) -> Any:
    record = knobs.change(name, value, who="user", reason="to see", step=step, incarnation=1)
    knobs.turned(record)
    return record


def test_without_a_change_the_values_are_the_configured_ones():
    knobs = make_knobs()
    assert (knobs.depth, knobs.concurrency, knobs.learning_rate) == (3, 0, 1e-5)
    assert knobs.metrics() == {"knobs/depth": 3, "knobs/concurrency": 0, "knobs/learning_rate": 1e-5}


def test_a_change_takes_effect_with_its_record_and_says_what_was_before():
    knobs = make_knobs()
    record = knobs.change("depth", 1, who="controller", reason="auto: idle 2 %", step=7, incarnation=2)
    assert knobs.depth == 3
    assert (record.old, record.value, record.number) == (3, 1, 1)
    assert (record.who, record.reason, record.step) == ("controller", "auto: idle 2 %", 7)
    knobs.turned(record)
    assert knobs.depth == 1
    assert turn(knobs, "depth", 2).old == 1
    assert [change.number for change in knobs.history] == [1, 2]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("depth", 4, r"depth 4 is refused: allowed is 1 to 3 \(S = 3 of max_staleness 3; below 1, weight_sync_steps 2"),
        ("depth", 0, "weight_sync_steps 2 would deadlock"),
        ("depth", 1.5, "depth 1.5 is refused"),
        ("depth", float("nan"), "depth nan is refused"),
        ("depth", float("inf"), "depth inf is refused"),
        ("concurrency", 3, r"concurrency 3 is refused: allowed is 0 \(no limit\), or 4 to"),
        ("learning_rate", 0, "learning_rate 0 is refused: allowed is 1e-12 to 1; now it is 1e-05"),
        ("learning_rate", -1e-6, "learning_rate -1e-06 is refused"),
        ("max_staleness", 2, "no knob 'max_staleness': allowed are depth, concurrency, learning_rate"),
    ],
)
def test_what_is_out_of_range_is_refused_with_what_would_do(name, value, said):
    knobs = make_knobs(sync_steps=2)
    with pytest.raises(KnobRefused, match=said):
        turn(knobs, name, value)
    assert not knobs.history


@pytest.mark.parametrize("value", [0, 4, 5])
def test_concurrency_may_be_unlimited_or_at_least_one_group(value):
    knobs = make_knobs()
    turn(knobs, "concurrency", value)
    assert knobs.concurrency == value


def test_a_history_gives_the_values_back():
    knobs = make_knobs()
    for name, value in (("depth", 1), ("learning_rate", 1e-6), ("depth", 2)):
        turn(knobs, name, value)
    again = make_knobs(*knobs.history)
    assert (again.depth, again.learning_rate, again.history) == (2, 1e-6, knobs.history)


def test_a_value_lasts_as_long_as_the_configuration_it_was_set_over():
    knobs = make_knobs()
    turn(knobs, "learning_rate", 1e-6)
    turn(knobs, "depth", 1)
    again = make_knobs(*knobs.history, learning_rate=1e-4)
    assert (again.learning_rate, again.depth) == (1e-4, 1)
    assert len(again.history) == 2, "what was done stays in the audit"


def test_a_checkpoint_and_the_journal_make_one_history():
    knobs = make_knobs()
    changes = [turn(knobs, "depth", value) for value in (1, 3, 1, 2)]
    assert joined_history(changes[:3], changes[1:]) == changes
    assert joined_history((), changes) == joined_history(changes, ()) == changes


def test_the_ledger_refuses_a_depth_that_would_break_the_bound_or_deadlock():
    ledger = Ledger(bounds(sync_steps=2))
    for depth in (0, 4):
        with pytest.raises(InvariantViolation, match=f"depth {depth}, allowed are 1 to 3"):
            ledger.limit_depth(depth)


def test_a_lower_depth_grants_nothing_until_it_has_drained_and_a_higher_one_at_once():
    ledger = Ledger(bounds())
    while ledger.can_grant():
        ledger.grant()
    assert ledger.slots_in_use == 8
    ledger.limit_depth(1)
    for sequence in range(8):
        assert ledger.can_grant() == (sequence >= 6)
        ledger.delivered(sequence, 0)
        if sequence % 2:
            ledger.batch([sequence - 1, sequence])
            ledger.trained([sequence - 1, sequence], ledger.policy_version + 1)
            ledger.live(ledger.policy_version)
    ledger.grant()
    ledger.limit_depth(3)
    assert sum(1 for _ in iter(lambda: ledger.can_grant() and ledger.grant(), False)) == 7


def test_every_knob_has_a_range():
    assert set(knob_ranges(bounds(), num_generations=4, learning_rate=1e-5)) == set(Knob)
