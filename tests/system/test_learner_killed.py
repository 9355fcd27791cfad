"""The learner dies again and again, at the worst moments, and the same command goes on each time.

One server process lives through all of it. Every death but the last is a SIGKILL that the process gives itself where
nothing could be tidied up (faulty_learner.py); the last is a polite SIGTERM.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.system.harness import END_S, RUN_S, START_S, Event, Lab, Process
from tests.system.lineage import Lineage, check_whole_lineage, read_lineage

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
STEPS = 14
SAVE_STEPS = 3
DEATHS = ("groups_journaled:2", "step_journaled:5", "checkpoint:6:renamed", "forward_backward:9")
"""In order: before the first step, with groups on disk that were never acknowledged; after checkpoint 3, with a step on
disk that was never applied; in the middle of a save, when the new checkpoint has its name and LATEST still names the
old one; in the middle of a step that has left no trace."""
RESUMED_FROM = (0, 0, 3, 6, 6)
"""The last two incarnations; the fifth is asked to stop."""


@dataclass
class Survived:
    """The run, when it is over."""

    lab: Lab
    server: Process
    deaths: list[int]
    witness: list[str]
    stopped_at: int
    stopped_with: int
    final_exit: int
    lineage: Lineage
    begun: list[Event]


@pytest.fixture(scope="module")
def survived(module_lab: Lab) -> Survived:
    """Four SIGKILLs and one SIGTERM; the sixth learner finishes the run."""
    lab = module_lab
    config = {"max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 10, "filter_zero_std": True}
    server = lab.server(scripted={"token_s": 0.004})
    witness = lab.directory / "witness"
    deaths = []
    for moment in DEATHS:
        learner = lab.learner(faults={"witness": str(witness), "die_at": moment}, **config)
        deaths.append(learner.wait_exit(START_S + RUN_S))
    stopped = lab.learner(**config)
    lab.wait_until(lambda: len(lab.run.events("begun")) == 5, START_S, "the fifth learner", alive=[stopped])
    lab.wait_step(10, alive=[stopped])
    stopped.signal(signal.SIGTERM)
    stopped_with = stopped.wait_exit(END_S)
    stopped_at = int(max(lab.run.checkpoints()).removeprefix("step-"))
    final = lab.learner(**config)
    final_exit = final.wait_exit(START_S + RUN_S)
    return Survived(
        lab, server, deaths, witness.read_text().splitlines(), stopped_at, stopped_with, final_exit,
        read_lineage(lab.run.path), lab.run.events("begun"),
    )  # fmt: skip


def test_the_server_read_weights_where_each_learner_put_them(survived: Survived) -> None:
    live = survived.server.events("weights_live")
    shared = {int(event["version"].partition(".")[0]) for event in live if event["path"] == "shared"}
    assert shared == {1, 2, 3, 4, 5, 6}, [event["path"] for event in live]
    assert list((survived.lab.directory / "staging").iterdir()) == [], "what the dead left is gone"


def test_every_death_happened(survived: Survived) -> None:
    assert survived.deaths == [-signal.SIGKILL] * len(DEATHS), survived.server.tail()
    assert survived.witness == [f"died at {moment.replace(':', ' ')}" for moment in DEATHS]


def test_each_start_goes_on_from_the_newest_checkpoint_with_a_higher_incarnation(survived: Survived) -> None:
    assert survived.final_exit == 0
    expected = [*enumerate(RESUMED_FROM, start=1), (6, survived.stopped_at)]
    assert survived.lineage.incarnations == expected
    assert [(int(e["incarnation"]), int(e["policy_version"])) for e in survived.begun] == expected


def test_no_ordinal_is_lost_and_none_is_trained_twice(survived: Survived) -> None:
    assert survived.lineage.orphaned, "steps were journaled and then left behind"
    check_whole_lineage(survived.lineage, survived.lab.run.ledger(f"step-{STEPS:06d}"), steps=STEPS)
    summary = survived.lab.run.summary()
    assert summary["steps"] == STEPS
    assert summary["groups_trained"] == 4 * STEPS
    assert summary["groups_unaccounted"] == 0
    assert summary["groups_quarantined"] == 0
    assert summary["staleness_max"] <= 2


def test_groups_on_disk_are_not_sampled_again(survived: Survived) -> None:
    """The second learner finds what the first journaled; the third, what the orphaned steps had trained."""
    restored = [int(event["restored"]) for event in survived.begun]
    assert restored[0] == 0
    assert restored[1] >= 2, "two appends of the first learner"
    assert restored[2] > 0
    assert max(row.get("groups/groups_restored", 0) for row in survived.lab.run.rows()) > 0
    begins = dict(survived.lineage.incarnations)
    for ordinal, records in survived.lineage.groups.items():
        for earlier, later in pairwise(records):
            newest = int(earlier.group.span_versions[:, 1].max())
            forks = [begins[i] for i in range(earlier.incarnation + 1, later.incarnation + 1)]
            assert forks, f"group {ordinal} is twice in the journal of learner {later.incarnation}"
            assert min(forks) < newest, f"group {ordinal} of version {newest} was sampled again: {forks}"


def test_the_server_survives_and_joins_each_learner_by_itself(survived: Survived) -> None:
    assert survived.server.wait_exit(END_S) == 0
    welcomed = [int(event["incarnation"]) for event in survived.server.events("welcomed")]
    # A learner that has groups enough on disk may have trained and died before the server was there.
    assert {1, 2, 6} <= set(welcomed) <= {1, 2, 3, 4, 5, 6}
    assert welcomed == sorted(welcomed), "an older learner never comes back"


def test_sigterm_saves_a_checkpoint_at_the_step_boundary(survived: Survived) -> None:
    assert survived.stopped_with == 128 + signal.SIGTERM
    assert survived.stopped_at >= 10
    (interrupted,) = survived.lab.run.events("interrupted")
    assert interrupted["signal"] == "SIGTERM"


def test_metrics_have_each_step_once(survived: Survived) -> None:
    assert [row["step"] for row in survived.lab.run.rows()] == list(range(1, STEPS + 1))
    assert Path(survived.lab.run.summary()["checkpoint"]).name == f"step-{STEPS:06d}"
