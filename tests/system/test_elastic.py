"""Servers come and go in one run: one is killed in the middle of groups, one joins, one is asked to leave.

The servers are told apart by what they sample: each knows more tokens than the one before.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from tests.system.harness import END_S, RUN_S, START_S, Lab, Process
from tests.system.lineage import Lineage, check_whole_lineage, read_lineage

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
STEPS = 40
TOKENS = {"killed": 8, "leaving": 16, "staying": 40}
SLOW = {"token_s": 0.05, "mean_length": 8.0, "length_sigma": 0.0}
"""0.4 s a group: with three steps' groups leased, some are always being decoded."""
BRISK = {"token_s": 0.01, "mean_length": 6.0}


@dataclass
class Elastic:
    """The run, when it is over."""

    lab: Lab
    learner: Process
    servers: dict[str, Process]
    lineage: Lineage
    held_at_kill: int

    def trained_by(self, name: str) -> list[int]:
        """Trained ordinals whose tokens only that server, or a larger one, can have sampled."""
        smaller = max((count for count in TOKENS.values() if count < TOKENS[name]), default=0)
        return [o for o in self.lineage.trained if smaller <= self.lineage.sampled_by(o) < TOKENS[name]]


@pytest.fixture(scope="module")
def elastic(module_lab: Lab) -> Elastic:
    """Kill one server, start two others, ask one of them to leave; the run goes on to its end."""
    lab = module_lab
    learner = lab.learner(max_steps=STEPS, liveness_s=2.0)

    def server(name: str, script: dict[str, float]) -> Process:
        return lab.server(name, scripted={**script, "vocab_size": TOKENS[name]}, drain_s=10.0)

    servers = {"killed": server("killed", SLOW)}
    lab.wait_step(2, alive=[learner, servers["killed"]])
    servers["killed"].kill()
    servers["leaving"] = server("leaving", BRISK)
    lost = lab.wait_until(lambda: lab.run.events("server_left"), RUN_S, "the loss of a server", alive=[learner])
    step = lab.run.step()
    lab.wait_step(step + 2, alive=[learner, servers["leaving"]])

    servers["staying"] = server("staying", BRISK)
    lab.wait_until(
        lambda: [e for e in lab.run.events("server_joined") if e["server"] == "staying"], START_S, "a third server"
    )
    lab.wait_step(lab.run.step() + 4, alive=[learner, *servers.values()][:1])
    servers["leaving"].signal(signal.SIGTERM)
    assert learner.wait_exit(RUN_S) == 0, learner.tail()
    return Elastic(lab, learner, servers, read_lineage(lab.run.path), int(lost[0]["groups"]))


def test_a_server_killed_mid_group_loses_nothing(elastic: Elastic) -> None:
    run = elastic.lab.run
    assert elastic.servers["killed"].exit_code == -signal.SIGKILL
    (left,) = [event for event in run.events("server_left") if event["server"] == "killed"]
    # Its silence tells, or before that a message that it should have got: a swap's turn, new weights.
    (how,) = [how for how in ("nothing heard", "its connection is gone") if how in left["text"]]
    assert elastic.held_at_kill > 0, "it was killed in the middle of groups"
    lost = [event for event in run.events("lease_lost") if how in event["reason"]]
    assert len(lost) == elastic.held_at_kill
    given_again = {int(event["ordinal"]) for event in lost}
    assert given_again <= set(elastic.lineage.trained)
    for ordinal in given_again:
        assert elastic.lineage.groups[ordinal][-1].group.attempt == 2


def test_weights_on_one_host_are_read_where_they_lie(elastic: Elastic) -> None:
    for name, server in elastic.servers.items():
        paths = [event["path"] for event in server.events("weights_live")]
        assert paths.count("shared") > len(paths) / 2, f"{name}: {paths}"  # else superseded between word and look
    assert list((elastic.lab.directory / "staging").iterdir()) == [], "nothing is left, not even of the killed one"


def test_every_ordinal_is_trained_exactly_once(elastic: Elastic) -> None:
    summary = elastic.lab.run.summary()
    check_whole_lineage(elastic.lineage, elastic.lab.run.ledger(f"step-{STEPS:06d}"), steps=STEPS)
    assert summary["steps"] == STEPS
    assert summary["groups_trained"] == 4 * STEPS
    assert summary["groups_unaccounted"] == 0
    assert summary["groups_quarantined"] == 0
    assert 0 < summary["staleness_max"] <= 2


def test_groups_of_every_server_are_trained(elastic: Elastic) -> None:
    assert {name: len(elastic.trained_by(name)) >= 4 for name in TOKENS} == dict.fromkeys(TOKENS, True)


def test_a_server_asked_to_leave_drains_and_ends_with_0(elastic: Elastic) -> None:
    leaving = elastic.servers["leaving"]
    assert leaving.wait_exit(END_S) == 0
    assert [event["reason"] for event in leaving.events("draining")] == ["SIGTERM"]
    (left,) = [event for event in elastic.lab.run.events("server_left") if event["server"] == "leaving"]
    assert left["text"] == "server leaving left: SIGTERM"
    assert left["groups"] == "0", "everything it held was finished or given back before its Goodbye"
    assert elastic.lab.run.step() > 0
    assert not [event for event in elastic.lab.run.events("lease_lost") if event["reason"] == "SIGTERM"]


def test_the_last_server_is_told_that_the_run_is_over(elastic: Elastic) -> None:
    staying = elastic.servers["staying"]
    assert staying.wait_exit(END_S) == 0
    assert "all 40 steps are trained" in staying.events("ended")[-1]["reason"]
