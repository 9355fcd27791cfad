"""Damage on the way: wrong or cut weight chunks, steps that are not finite, rewards without a difference, a hang."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.system.harness import END_S, RUN_S, START_S, Lab, reward, write_jsonl

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
TIMEOUT_S = 0.5
"""Of a reward call."""


def test_wrong_and_short_weight_chunks_are_fetched_again_and_poisoned_steps_skipped(lab: Lab) -> None:
    """One run, three faults: none of them may reach the policy."""
    witness = lab.directory / "witness"
    faults = {
        "witness": str(witness), "corrupt_chunks": 2, "truncate_chunks": 2, "poison_loss": [3], "poison_gradient": [5],
    }  # fmt: skip
    elsewhere = str(lab.directory / "elsewhere")  # else the server reads the learner's file, and no chunk is sent
    learner = lab.learner(faults=faults, max_steps=6, eval_dataset=str(lab.data()), eval_size=4, staging_dir=elsewhere)
    server = lab.server(
        engine="transformers", model=str(lab.model), max_model_length=64, reward_funcs=[reward("parity")]
    )
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0

    happened = witness.read_text().splitlines()
    assert [line.split()[0] for line in happened] == ["corrupted"] * 2 + ["truncated"] * 2 + ["poisoned"] * 2
    versions = {line.split()[1] for line in happened if not line.startswith("poisoned")}
    live = server.events("weights_live")
    damaged = [event for event in live if event["version"] in versions]
    assert len(damaged) == len(versions), "every version that was damaged on the way went live all the same"
    assert sum(int(event["refetched_blocks"]) for event in damaged) >= 2
    assert [event["version"] for event in live][-1] == "1.6"
    assert {event["path"] for event in live} <= {"dense", "none"}

    rows = lab.run.rows()
    assert [row["policy_version"] for row in rows if row["skipped"]] == [2, 3]
    assert [event["text"] for event in lab.run.events("step_skipped")] == [
        "step 3 skipped: loss is nan", "step 4 skipped: gradient norm is nan",
    ]  # fmt: skip
    summary = lab.run.summary()
    assert (summary["steps"], summary["steps_skipped"], summary["groups_unaccounted"]) == (6, 2, 0)
    assert lab.run.ledger("step-000006")["ends"]["skipped"] == 8
    assert all(abs(row["policy_kl"]) < 0.5 for row in rows if not row["skipped"]), "both sides hold the same weights"


def test_steps_that_are_never_finite_stop_the_run(lab: Lab) -> None:
    witness = lab.directory / "witness"
    faults = {"witness": str(witness), "poison_loss": list(range(4, 20))}
    learner = lab.learner(faults=faults, max_skipped_steps=3, save_steps=2)
    server = lab.server()
    assert learner.wait_exit(START_S + RUN_S) == 1, learner.tail()
    assert witness.read_text().splitlines() == [f"poisoned the loss of call {call}" for call in (4, 5, 6)]
    line = learner.text().splitlines()[-1]
    assert line.startswith("headway-learner: error: 3 steps in a row could not be trained")
    assert "because: loss is nan" in line
    assert str(lab.run.path / "checkpoints" / "step-000002") in line
    assert "Traceback" not in learner.text()
    assert server.exit_code is None, "it waits for the next learner"


def test_a_task_without_reward_differences_stops_with_one_line(lab: Lab) -> None:
    """The first rows have rewards that differ; all the others are always right, as in a solved task."""
    rows = ({"prompt": f"{i} =", "solved": i >= 20} for i in range(400))
    write_jsonl(lab.data(), rows)
    learner = lab.learner(
        filter_zero_std=True, shuffle=False, max_steps=50, max_skipped_steps=2, max_refill_ratio=2, save_steps=1
    )
    server = lab.server(reward_funcs=[reward("solved")])
    assert learner.wait_exit(START_S + RUN_S) == 1, learner.tail()
    line = learner.text().splitlines()[-1]
    assert line.startswith("headway-learner: error: 2 steps in a row could not be trained, the last one because: every")
    newest = max(lab.run.checkpoints())
    assert f"The last good checkpoint is {lab.run.path / 'checkpoints' / newest}." in line
    assert "Traceback" not in learner.text()
    trained = lab.run.step()
    assert newest == f"step-{trained:06d}"
    assert 2 <= trained <= 20, "each with one of the groups that differ, at least: past the refill cap steps are short"
    filtered = [event for event in lab.run.events("group_filtered") if event["reason"] == "all rewards are 1"]
    assert len(filtered) >= 2 * 2 * 4, "twice the refill cap of a step"
    assert not (lab.run.path / "summary.json").exists()
    server.signal(signal.SIGTERM)
    assert server.wait_exit(END_S) == 0


def test_a_hanging_verifier_costs_a_worker_and_a_bounded_wait(lab: Lab) -> None:
    witness = lab.directory / "hung"
    write_jsonl(lab.data(), ({"prompt": f"{i} =", "witness": str(witness)} for i in range(64)))
    learner = lab.learner(max_steps=6)
    server = lab.server(reward_funcs=[reward("hangs")], reward_timeout_s=TIMEOUT_S, reward_workers=2)
    assert learner.wait_exit(START_S + RUN_S) == 0, learner.tail() + server.tail()
    assert server.wait_exit(END_S) == 0

    hung = witness.read_text().split()
    assert len(hung) >= 4
    assert len(set(hung)) == len(hung), "each hang took its process down: it was another that hung the next time"
    for pid in map(int, hung):
        assert not Path(f"/proc/{pid}").exists(), "a hung verifier lives on"
    rows = lab.run.rows()
    assert sum(row["rewards/timeouts"] for row in rows) > 0
    assert all(row["groups_unaccounted"] == 0 for row in rows)
    summary = lab.run.summary()
    assert summary["steps"] == 6
    assert summary["groups_trained"] == 24, "a group whose verifier hung on one completion trains with the others"
    # A group's first call and the search for culprits: three limits. Every group of a step may queue for a worker.
    assert max(row["step_time"] for row in rows) < 4 * 3 * TIMEOUT_S + 5
