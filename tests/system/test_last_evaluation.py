"""A learner that is killed in its last evaluation has trained every step, and yet the run is not over."""

from __future__ import annotations

import signal

import pytest

from tests.system.harness import END_S, RUN_S, START_S, Lab

pytestmark = pytest.mark.system


def test_a_run_killed_in_its_last_evaluation_ends_with_the_next_learner(lab: Lab) -> None:
    config = {"max_steps": 2, "eval_dataset": str(lab.data()), "eval_size": 24}
    lab.server(scripted={"token_s": 0.02})
    killed = lab.learner(**config)
    lab.wait_until(
        lambda: lab.run.checkpoints() and lab.run.events("evaluated"), START_S + RUN_S, "all but the last evaluation",
        alive=[killed],
    )  # fmt: skip
    killed.kill()
    assert killed.wait_exit(END_S) == -signal.SIGKILL
    assert not (lab.run.path / "summary.json").exists(), "the last evaluation was going on"

    assert lab.learner(**config).wait_exit(START_S + RUN_S) == 0

    summary = lab.run.summary()
    assert (summary["steps"], summary["groups_trained"], summary["groups_unaccounted"]) == (2, 8, 0)
    assert [(point["oldest"], point["newest"]) for point in summary["evals"]] == [(0, 0), (2, 2)]
    over = lab.learner(**config)
    assert over.wait_exit(START_S) == 2
    assert "has trained its 2 steps: raise max_steps to go on" in over.text()
