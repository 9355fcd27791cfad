"""Whole runs of both processes' shipped loops on a virtual clock, with servers and learners that come and go.

Judged at every batch, from what the groups themselves say (tests/simulation.py): the bound, the lineage, no prompt
twice, nothing unaccounted, slots, and no stall with a healthy server (I1, I3, I4, I5, I7, I8). Reproduce a failure
with its plan; add seeds freely: a run of 25 steps takes a third of a second.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest

from learner.ledger import End, Ledger
from learner.token_ledger import TokenLedger
from protocol.errors import StalenessViolation
from tests.simulation import Plan, Simulation, simulate


@pytest.fixture(autouse=True)
def _no_power_cuts_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in a simulation cuts the power: its thousands of syncs need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: None)


def check_faults(simulation: Simulation) -> None:
    """The faults that the plan asks for did happen."""
    plan, network = simulation.plan, simulation.network.witness
    assert network.delayed > 0
    assert network.duplicated > 0
    for what in plan.chaos if len(plan.chaos) == 1 else ():
        assert simulation.witness[what] > 0
    if plan.chaos == ("cut",):
        assert network.cut > 0
    if plan.chaos == ("kill engine",):
        assert simulation.witness["engines restarted"] > 0
    if plan.chaos == ("stick swap",):
        assert simulation.witness["turns expired"] > 0
    if plan.chaos == ("turn knob",):
        assert simulation.witness["steps at a lower depth"] > 0
    if len(plan.chaos) > 1:
        assert sum(simulation.witness[what] for what in plan.chaos) >= 2


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"max_staleness": 0},
        {"max_staleness": 0, "eval_steps": 3},
        {"max_staleness": 1, "prompts_per_step": 2},
        {"max_staleness": 3, "weight_sync_steps": 2},
        {"max_staleness": 4},
        {"max_staleness": 5, "prompts_per_step": 1, "eval_steps": 4},
        {"max_staleness": 6, "reorder_window": 7},
        {"max_staleness": 2, "max_refill_ratio": 0},
        {"max_staleness": 1, "staleness_policy": "drop"},
        {"max_staleness": 0, "staleness_policy": "drop"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_the_bound_holds_and_the_run_ends_whatever_the_dial_says(options, seed, tmp_path):
    simulation = simulate(Plan(seed=seed, options=options), tmp_path)
    check_faults(simulation)
    assert simulation.witness["versions checked"] > 0
    assert len(simulation.trace) >= 25
    bound = options["max_staleness"]
    assert simulation.staleness_max <= bound
    assert (simulation.staleness_max > 0) == (bound > 0), "rollouts do run ahead, and in synchronous mode do not"


@pytest.mark.parametrize(("servers", "seed"), [(3, 3), (1, 4)])
@pytest.mark.parametrize("what", Simulation.CHAOS)
def test_the_bound_holds_and_the_run_ends_whatever_goes_wrong(what, servers, seed, tmp_path):
    simulation = simulate(Plan(seed=seed, servers=servers, max_steps=30, chaos=(what,)), tmp_path)
    check_faults(simulation)
    if what.endswith("learner"):
        assert simulation.witness["groups restored"] > 0, "journaled groups are not sampled again"


@pytest.mark.parametrize("seed", [6, 7])
@pytest.mark.parametrize(
    "options",
    [
        {"max_staleness": 4, "eval_steps": 5},
        {"max_staleness": 0},
        {"max_staleness": 3, "weight_sync_steps": 3},
        {"max_staleness": 1, "staleness_policy": "drop"},
    ],
    ids=["asynchronous", "synchronous", "every third version", "dropping"],
)
def test_the_bound_holds_and_the_run_ends_when_everything_goes_wrong(options, seed, tmp_path):
    check_faults(simulate(Plan(seed=seed, max_steps=40, options=options, chaos=Simulation.CHAOS), tmp_path))


@pytest.mark.parametrize("seed", [8, 9])
def test_knobs_keep_their_values_when_the_learner_dies(seed, tmp_path):
    simulation = simulate(
        Plan(seed=seed, max_steps=40, options={"max_staleness": 3}, chaos=("turn knob", "kill learner")), tmp_path
    )
    check_faults(simulation)
    assert simulation.witness["knobs kept"] > 0
    assert simulation.witness["kill learner"] > 0


def test_no_token_is_missed_of_servers_that_outlive_their_learner(monkeypatch, tmp_path):
    """A heartbeat may come before the groups that the learner before had not acknowledged."""
    unchecked, before_resends = TokenLedger.reported, Counter[str]()

    def reported(ledger: TokenLedger, process: str, *, generated: int, held: int) -> None:
        unchecked(ledger, process, generated=generated, held=held)
        server = ledger._servers[process]
        before_resends[process] += len(server.owed)
        assert server.generated >= server.arrived + server.held, "more has come than it has sampled"

    monkeypatch.setattr(TokenLedger, "reported", reported)
    for seed in (10, 12, 13):
        simulate(Plan(seed=seed, max_steps=60, chaos=("kill learner", "stop learner")), tmp_path / str(seed))
    assert before_resends.total() > 0


def test_the_bound_is_reached(tmp_path):
    """It is a bound, not a distance kept: some group does train exactly max_staleness late."""
    reached = {simulate(Plan(seed=seed), tmp_path / str(seed)).staleness_max for seed in range(20, 23)}
    assert max(reached) == 2


def test_a_run_follows_from_its_seed(tmp_path):
    plan = Plan(seed=10, max_steps=20, chaos=Simulation.CHAOS)
    first, second = (simulate(plan, tmp_path / name) for name in "ab")
    assert first.trace == second.trace
    assert first.witness == second.witness
    other = simulate(Plan(seed=11, max_steps=20, chaos=Simulation.CHAOS), tmp_path / "c")
    assert other.trace != first.trace


def test_without_the_rule_of_min_versions_the_bound_breaks(monkeypatch, tmp_path):
    """What the simulation is worth: leases to whoever is there, and slots that free at the first report."""
    monkeypatch.setattr(Ledger, "min_policy_version", lambda ledger, sequence: 0)

    def break_something(directory: Path) -> None:
        for seed in range(30, 40):
            simulate(Plan(seed=seed, options={"max_staleness": 1}, chaos=("cut",)), directory / str(seed))

    with pytest.raises(ExceptionGroup) as raised:
        break_something(tmp_path)
    assert raised.group_contains(StalenessViolation, match="I4") or raised.group_contains(AssertionError, match="I4")


@pytest.mark.parametrize(("policy", "drops"), [("wait", False), ("drop", True)])
def test_groups_end_stale_where_they_may_be_dropped_and_nowhere_else(policy, drops, tmp_path):
    options = {"max_staleness": 1, "prompts_per_step": 3, "staleness_policy": policy}
    simulation = simulate(Plan(seed=12, max_steps=40, options=options, skip=0.0, fail=0.0), tmp_path)
    assert simulation.run is not None
    stale = simulation.run.coordinator.ledger.ends[End.STALE]
    assert (stale > 0) is drops
    assert simulation.staleness_max <= 1


def test_a_depth_that_is_steered_stays_inside_the_bound_and_every_move_is_on_record(tmp_path):
    options = {"max_staleness": 4, "staleness_control": "auto"}
    simulation = simulate(Plan(seed=14, max_steps=80, options=options, chaos=("kill learner",)), tmp_path)
    assert simulation.witness["kill learner"] > 0
    assert simulation.run is not None
    moves = simulation.run.coordinator.knobs.history
    assert len(moves) > 2
    assert all(move.who == "controller" and move.name == "depth" and move.reason for move in moves)
    assert simulation.witness["steps at a lower depth"] > 0
    assert simulation.staleness_max <= 4
