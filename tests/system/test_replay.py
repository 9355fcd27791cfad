"""A learner that dies and goes on by replay, whose knobs are turned meanwhile; then all of it trained again.

Through the public commands: train, knob, replay. Two deaths by SIGKILL, each with a step on disk that was not applied;
after the second there is still only the first learner's checkpoint.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from learner.checkpoint import read_state
from learner.knobs.socket import SOCKET_FILE, Answer, Request, ask
from learner.token_ledger import TokenEnd
from tests.replays import rewrite, with_other_reward
from tests.system.harness import END_S, PYTHON, ROOT, RUN_S, START_S, Event, Lab
from tests.system.lineage import Lineage, check_whole_lineage, read_lineage

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]
STEPS = 40
RATE, NEW_RATE = 1e-3, 5e-4


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the learner to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(PYTHON), "-m", "learner", *argv], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=RUN_S
    )


@dataclass
class Replayed:
    """The run, when it is over."""

    lab: Lab
    deaths: list[int]
    turned: subprocess.CompletedProcess[str]
    answers: list[Answer]
    final_exit: int
    lineage: Lineage
    begun: list[Event]

    @property
    def path(self) -> Path:
        return self.lab.run.path


@pytest.fixture(scope="module")
def replayed(module_lab: Lab) -> Replayed:
    """Checkpoint 4; dead at 7; from 7 on, dead at 8; from 8 on to the end, with knobs turned on the way."""
    lab = module_lab
    config: dict[str, Any] = {
        "max_steps": STEPS, "save_steps": 4, "save_total_limit": 20, "resume": "replay", "learning_rate": RATE,
        "kl_target": 0.01, "beta": 0.05, "num_mini_batches": 2,
    }  # fmt: skip
    lab.server(scripted={"token_s": 0.02})
    deaths = []
    for moment in ("step_journaled:7", "step_journaled:8"):
        learner = lab.learner(faults={"witness": str(lab.directory / "witness"), "die_at": moment}, **config)
        deaths.append(learner.wait_exit(START_S + RUN_S))
    (lab.run.path / SOCKET_FILE).unlink()  # of the dead: what is there now is the last learner's
    final = lab.learner(**config)
    lab.wait_until((lab.run.path / SOCKET_FILE).exists, START_S, "the knobs' socket", alive=[final])
    turned = command("knob", str(lab.run.path), "learning_rate", str(NEW_RATE), "--reason", "calmer")
    # The others over the same socket without a new process each: the run does not last for ever.
    answers = [ask(lab.run.path, Request(name="depth", value=0), timeout_s=END_S)]
    lab.wait_until(lambda: lab.run.rows()[-1]["knobs/depth"] == 0, RUN_S, "a step at depth 0", alive=[final])
    answers += [ask(lab.run.path, Request(name="depth", value=value), timeout_s=END_S) for value in (9, 2)]
    answers.append(ask(lab.run.path, Request(), timeout_s=END_S))
    final_exit = final.wait_exit(START_S + RUN_S)
    return Replayed(lab, deaths, turned, answers, final_exit, read_lineage(lab.run.path), lab.run.events("begun"))


def test_each_learner_goes_on_after_the_last_step_on_disk(replayed: Replayed) -> None:
    assert replayed.deaths == [-signal.SIGKILL] * 2
    assert replayed.final_exit == 0
    assert [(e["incarnation"], e["policy_version"]) for e in replayed.begun] == [("1", "0"), ("2", "7"), ("3", "8")]
    assert replayed.lineage.incarnations == [(1, 0), (2, 7), (3, 8)]
    known = read_state(replayed.path / "checkpoints" / f"step-{STEPS:06d}").incarnations
    assert [(record.incarnation, record.resumed_from, record.replayed) for record in known] == [
        (1, 0, 0), (2, 7, 3), (3, 8, 4),
    ]  # fmt: skip
    assert all(record.config and record.numerics for record in known), "the journal may have lost them"


def test_nothing_is_left_behind_trained_twice_or_sampled_again(replayed: Replayed) -> None:
    assert not replayed.lineage.orphaned
    check_whole_lineage(replayed.lineage, replayed.lab.run.ledger(f"step-{STEPS:06d}"), steps=STEPS)
    assert [row["step"] for row in replayed.lab.run.rows()] == list(range(1, STEPS + 1))
    assert {len(records) for records in replayed.lineage.groups.values()} == {1}, "each group was accepted once"
    summary = replayed.lab.run.summary()
    assert (summary["groups_trained"], summary["groups_unaccounted"]) == (4 * STEPS, 0)
    assert summary["staleness_max"] <= 2


def test_the_tokens_of_every_step_are_accounted_for(replayed: Replayed) -> None:
    """Of 7 and 8, too, which died before their row was written: the next learner writes it."""
    rows = replayed.lab.run.rows()
    trained = [0, *(row["tokens/trained"] for row in rows)]
    assert [after - before for before, after in pairwise(trained)] == [row["step_tokens"] for row in rows]
    ends = [sum(row[f"tokens/{end}"] for end in TokenEnd) + row["tokens/under_way"] for row in rows]
    assert ends == [row["tokens/generated"] for row in rows]


def test_the_knob_command_turns_and_lists_and_refuses(replayed: Replayed) -> None:
    assert replayed.turned.returncode == 0, replayed.turned.stderr
    assert replayed.turned.stdout.startswith("learning_rate: 0.001 -> 0.0005, from step ")
    lower, outside, higher, listed = replayed.answers
    assert [(a.changed.old, a.changed.value) for a in (lower, higher) if a.changed] == [(2, 0), (0, 2)]
    assert outside.refused.startswith("depth 9 is refused: allowed is 0 to 2 (S = 2 of")
    assert [(r.name, r.value, r.who, r.reason) for r in listed.history] == [
        ("learning_rate", NEW_RATE, "user", "calmer"), ("depth", 0, "user", ""), ("depth", 2, "user", ""),
    ]  # fmt: skip
    rates = [row["learning_rate"] for row in replayed.lab.run.rows()]
    assert sorted(rates, reverse=True) == rates
    assert set(rates) == {RATE, NEW_RATE}
    turned = {
        record.name: record.step for record in listed.history[:-1]
    }  # depth: lowered, and then back to what it was
    assert replayed.turned.stdout.endswith(f"from step {turned['learning_rate'] + 1} on\n")
    assert [row["step"] for row in replayed.lab.run.rows() if row["learning_rate"] == NEW_RATE] == list(
        range(turned["learning_rate"] + 1, STEPS + 1)
    )
    lowered = [row["step"] for row in replayed.lab.run.rows() if row["knobs/depth"] == 0]
    assert lowered == list(range(lowered[0], lowered[-1] + 1))
    # A row is written when its step is over: a knob that is turned just before it shows in it.
    assert lowered[0] - turned["depth"] in (0, 1)
    assert lowered[-1] - listed.history[-1].step in (-1, 0)


def test_a_run_that_is_over_has_no_knobs(replayed: Replayed) -> None:
    done = command("knob", str(replayed.path), "depth", "1")
    assert done.returncode == 2
    assert "no learner is training in" in done.stderr


def test_the_whole_run_is_trained_again_bit_for_bit(replayed: Replayed) -> None:
    done = command("replay", str(replayed.path), "--start", "0")
    assert done.returncode == 0, done.stdout + done.stderr
    # Of 7 and 8 the rows and the weights are those of the learners that replayed them; 8 has no checkpoint.
    checked = f"the same: {STEPS} rows of metrics, {STEPS} published versions, {STEPS // 4 - 1} checkpoints"
    assert checked in done.stdout


def test_one_changed_reward_is_found_at_its_step(replayed: Replayed, tmp_path: Path) -> None:
    step = 11
    ordinal = replayed.lineage.steps[step][2]
    shutil.copytree(replayed.path, tmp_path / "altered")
    rewrite(tmp_path / "altered", with_other_reward(ordinal))
    done = command("replay", str(replayed.path), "--against", str(tmp_path / "altered"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"the first difference is in step {step}: groups: group {ordinal} has other rewards" in done.stdout
    alone = command("replay", str(tmp_path / "altered"), "--start", "4", "--to", "16")
    assert alone.returncode == 1
    assert f"the first difference is in step {step}: " in alone.stdout
