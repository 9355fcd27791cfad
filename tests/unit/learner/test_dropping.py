"""The ledger of staleness_policy drop, by example; whole runs with it are in tests/property/test_simulation.py."""

from __future__ import annotations

from learner.config import LearnerConfig
from learner.dropping import DroppingLedger
from learner.ledger import End, Ledger, State, Verdict
from learner.staleness import derive_bounds


def make_ledger(max_staleness: int = 1, prompts_per_step: int = 2) -> DroppingLedger:
    ledger = DroppingLedger(derive_bounds(max_staleness=max_staleness, prompts_per_step=prompts_per_step))
    lease(ledger)
    return ledger


def lease(ledger: Ledger, live: int = 0) -> None:
    while ledger.can_grant():
        ledger.grant()
    for entry in ledger.pending():
        ledger.dispatched(entry.sequence, "north", live)


def deliver(ledger: Ledger, *sequences: int) -> None:
    for sequence in sequences:
        entry = ledger.entries[sequence]
        ledger.delivered(entry.ordinal, entry.floor)


def train(ledger: Ledger) -> list[int]:
    """One step, live at once; what has become too old ends. Return the ordinals that trained."""
    chosen = ledger.select()
    ordinals = [ledger.entries[sequence].ordinal for sequence in chosen]
    ledger.batch(chosen)
    for entry in ledger.expired():
        ledger.end(entry.sequence, End.STALE)
    ledger.check_staleness(chosen)
    ledger.trained(chosen, ledger.policy_version + 1)
    ledger.live(ledger.policy_version)
    return ordinals


def test_whatever_has_finished_trains_oldest_first():
    ledger = make_ledger()
    deliver(ledger, 3)
    assert ledger.select() == [3]
    deliver(ledger, 1, 2)
    assert ledger.select() == [1, 2], "0 is passed, without a window"


def test_a_straggler_is_passed_until_no_step_may_have_it_then_it_is_dropped():
    ledger = make_ledger(max_staleness=1, prompts_per_step=2)
    deliver(ledger, 1, 2)
    assert train(ledger) == [1, 2]
    assert ledger.entries[0].state is State.LEASED, "the next step, of staleness 1, may still have it"
    assert ledger.judge(0, 0) is Verdict.ACCEPT
    lease(ledger, live=1)
    deliver(ledger, 3, 4)
    assert train(ledger) == [3, 4]
    assert ledger.find(0) is None
    assert ledger.ends[End.STALE] == 1
    assert ledger.unaccounted == 0
    assert ledger.can_grant(), "I2: its slot is free at once"
    assert ledger.judge(0, 0) is Verdict.DUPLICATE, "should it still come"


def test_a_finished_group_is_dropped_like_one_under_way_but_not_what_waits_for_a_server():
    ledger = make_ledger(max_staleness=0, prompts_per_step=1)
    ledger.lost(0, fault=False)
    assert ledger.expired() == []
    ledger.dispatched(0, "north", 0)
    ledger.policy_version = 1
    assert [entry.sequence for entry in ledger.expired()] == [0]
    deliver(ledger, 0)
    assert [entry.sequence for entry in ledger.expired()] == [0]


def test_a_short_step_drops_whom_it_makes_too_old():
    ledger = make_ledger(max_staleness=0, prompts_per_step=2)
    deliver(ledger, 0)
    assert ledger.may_train_short([0])
    assert train(ledger) == [0]
    assert ledger.ends[End.STALE] == 1


def test_groups_that_wait_are_never_expired():
    assert Ledger(derive_bounds(max_staleness=0, prompts_per_step=1)).expired() == []


def test_rollouts_run_as_far_ahead_as_the_bound():
    config = LearnerConfig(model="m", dataset="d", staleness_policy="drop")
    assert config.bounds.steps_ahead == config.max_staleness == 4, "and no window takes a part of it"
