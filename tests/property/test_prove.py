"""What `make prove` runs for minutes, for seconds: the shipped ledger and fleet at random, and lengths that train."""

from __future__ import annotations

from dataclasses import replace

import pytest

from learner.ledger import Ledger
from protocol.errors import StalenessViolation
from tests.prove.lengths import PROMPTS, lengths_of, play
from tests.prove.machine import Broken, Machine, Plan
from tests.prove.plans import PLANS
from tests.prove.world import bounds_of
from tests.prove.wrong import FreedAtOptimizerStep, LostToTheTail, SlotsAlone, WindowOfPositions


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.name)
def test_nothing_trains_too_old_nothing_is_lost_and_nothing_gets_stuck(plan):
    tally = Machine(plan, seed=7).run(3000 + 200 * plan.bounds.prompts_per_step)
    counts = tally.counts
    assert counts["trained"] == tally.staleness.total() > 0
    assert (counts["stale"] > 0) is plan.drops
    happens = {"filter": "filtered", "lose": "losses", "skip": "skipped", "leave": "servers lost", "depth": "depths"}
    for what, counted in happens.items():
        assert (counts[counted] > 0) is (getattr(plan, what) > 0), f"{what} was to happen"
    assert 0 <= max(tally.staleness) <= plan.bounds.max_staleness


def test_the_adversary_reaches_the_bound():
    plan = next(plan for plan in PLANS if plan.name == "the default")
    assert max(Machine(plan, seed=1).run(50_000).staleness) == plan.bounds.max_staleness == 4


def test_a_restart_takes_back_what_was_journaled_and_loses_nothing():
    plan = Plan(name="restarts", bounds=bounds_of(4, 3, 5), servers=2, restart=0.05)
    counts = Machine(plan, seed=1).run(5000).counts
    assert counts["restarts"] > 5
    assert counts["restored"] > 5


@pytest.mark.parametrize(
    ("ledger", "bounds", "servers"),
    [
        (SlotsAlone, bounds_of(4, 1), 2),
        (FreedAtOptimizerStep, bounds_of(4, 1), 1),
        (WindowOfPositions, bounds_of(4, 3, 5), 1),
        (LostToTheTail, bounds_of(4, 3), 1),
    ],
)
def test_the_machine_finds_what_is_wrong_with_rejected_rules(ledger, bounds, servers):
    plan = Plan(name="wrong", bounds=bounds, ledger=ledger, servers=servers, lose=0.1)
    with pytest.raises((Broken, StalenessViolation), match="I4"):
        Machine(plan, seed=1).run(20_000)
    Machine(replace(plan, ledger=Ledger), seed=1).run(2000)


def test_a_run_that_is_stuck_says_so():
    with pytest.raises(Broken, match="I8: nothing moves"):
        Machine(Plan(name="S < k - 1", bounds=bounds_of(2, 0, 1, 2)), seed=1).run(100)


@pytest.mark.parametrize("max_staleness", [1, 4])
def test_who_waits_trains_lengths_as_they_were_leased_and_who_drops_does_not(max_staleness):
    wait, drop = (play(policy, max_staleness, alike=0.5, seed=1, steps=60) for policy in ("wait", "drop"))
    assert wait.stale == 0
    most_under_way = (max_staleness + 1) * PROMPTS
    assert set(range(60 * PROMPTS - most_under_way)) <= set(wait.ordinals), "every prompt, once its turn has come"
    leased = [length for ordinal in sorted(wait.ordinals) for length in lengths_of(1, ordinal, 0.5)]
    assert sorted(wait.trained) == sorted(leased)
    assert wait.ratio == 1.0
    assert drop.stale > 0
    assert drop.ratio < 0.92, "long ones are missing"
    assert drop.wasted_share > 0.1
    assert wait.staleness_max <= max_staleness >= drop.staleness_max
