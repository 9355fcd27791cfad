"""Small cases of the shipped ledger, gone through completely: the bound is exact, nothing gets stuck, and every rule
that was rejected breaks. learner/staleness.md says why; tests/prove runs larger ones (`make prove`)."""

from __future__ import annotations

import pytest

from learner.staleness import derive_bounds
from protocol.errors import ConfigError
from tests.prove.cases import NO_PROGRESS, PLAIN, REJECTED, SMALL, USELESS_WINDOW, problems
from tests.prove.exhaustive import search
from tests.prove.world import Case, World, bounds_of
from tests.prove.wrong import FreedAtOptimizerStepButAsked, SlotsAlone


@pytest.mark.parametrize("case", SMALL, ids=lambda case: f"{case.ledger.__name__}: {case.name}")
def test_the_oldest_group_is_as_old_as_the_formula_says_and_no_state_is_a_dead_end(case):
    assert problems(case, search(case)) == []


def test_what_derive_bounds_accepts_is_what_was_found_to_be_useful():
    def accepts(bounds):
        try:
            return derive_bounds(
                max_staleness=bounds.max_staleness, prompts_per_step=bounds.prompts_per_step,
                reorder_window=bounds.reorder_window, weight_sync_steps=bounds.weight_sync_steps,
            ) == bounds  # fmt: skip
        except ConfigError:
            return False

    assert all(accepts(bounds) for bounds in PLAIN)
    assert not any(accepts(bounds) for bounds in [*USELESS_WINDOW, *NO_PROGRESS])


@pytest.mark.parametrize("rejected", REJECTED, ids=lambda rejected: rejected.name)
def test_a_rejected_rule_breaks_the_bound_and_in_no_smaller_case(rejected):
    for case in rejected.holds:
        assert search(case).violation == ""
    found = search(rejected.breaks)
    assert found.violation.startswith("I4")
    world = World(rejected.breaks)
    for move in found.trace[:-1]:
        assert move in world.moves(), "the counterexample is one"
        world.apply(move)


def test_slots_alone_keep_the_bound_with_one_server():
    """With one server no lease is ever refused for its version: the rule of min_versions is for several."""
    for bounds in (bounds_of(2, 1, 3), bounds_of(1, 2, 2)):
        found = search(Case(bounds=bounds, ledger=SlotsAlone))
        shipped = search(Case(bounds=bounds))
        assert (found.states, found.transitions) == (shipped.states, shipped.transitions)
        assert found.staleness_max == bounds.max_staleness


@pytest.mark.parametrize("servers", [1, 2])
def test_slots_that_free_early_are_safe_where_every_lease_asks_for_its_version(servers):
    found = search(Case(bounds=bounds_of(2, 1), servers=servers, ledger=FreedAtOptimizerStepButAsked))
    assert found.violation == ""
    assert found.dead_ends == 0
