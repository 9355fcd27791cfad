"""Where two runs part, where not every step's weights are recorded, or every step can be trained again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from learner.journal_records import GroupRecord
from learner.replay import trained_again
from learner.replay.recorded import RecordedRun
from learner.replay.trained_again import Replay
from learner.weights_archive.archive import VERSIONS
from tests.replays import GROUPS, LiveRun, rewrite, run_replay, with_other_reward


def without_groups(*steps: int) -> Callable[[Any], Any]:
    """As if they had been pruned."""
    gone = {GROUPS * (step - 1) + i for step in steps for i in range(GROUPS)}
    return lambda record: None if isinstance(record, GroupRecord) and record.group.ordinal in gone else record


def forget_weights(run_dir: Path, *steps: int) -> None:
    """As if they had not been published."""
    path = run_dir / "weights" / VERSIONS
    rows = [line for line in path.read_bytes().splitlines() if msgspec.json.decode(line)["version"][1] not in steps]
    path.write_bytes(b"".join(row + b"\n" for row in rows))


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From where was trained again, for each run."""
    begun: list[int] = []

    class Noted(Replay):
        def __init__(self, run: RecordedRun, start: int) -> None:
            begun.append(start)
            super().__init__(run, start)

    monkeypatch.setattr(trained_again, "Replay", Noted)
    return begun


@pytest.fixture
def pair(make, tmp_path: Path) -> tuple[LiveRun, Path]:
    """Six steps, with checkpoints of 2 and 4; and a copy."""
    run = make()
    run.begin()
    run.train(1, 2)
    run.save()
    run.train(3, 4)
    run.save()
    run.train(5, 6)
    shutil.copytree(run.path, tmp_path / "other")
    return run, tmp_path / "other"


def test_a_recorded_difference_is_said_though_older_steps_cannot_be_trained_again(pair, capsys):
    run, other = pair
    for path in (run.path, other):
        forget_weights(path, 1)
        shutil.rmtree(path / "checkpoints")
        rewrite(path, without_groups(1))
    rewrite(other, with_other_reward(3))
    forget_weights(other, 2)
    assert run_replay(run, "--against", str(other)) == 1
    said = capsys.readouterr().out
    assert "steps 1 to 1 cannot be trained again in both" in said
    assert "what follows is the first difference that was recorded" in said
    assert "the first difference is in step 2: groups: group 3 has other rewards" in said


def test_steps_before_equal_weights_are_not_trained_again(pair, capsys, starts):
    run, other = pair
    for path in (run.path, other):
        forget_weights(path, 1, 2, 3, 5)
    assert run_replay(run, "--against", str(other)) == 0
    assert "no difference up to step 6" in capsys.readouterr().out
    assert starts == [], "the weights after step 6 are the same"


def test_equal_checkpoints_are_equal_weights(pair, starts):
    run, other = pair
    for path in (run.path, other):
        forget_weights(path, 1, 2, 3, 4, 5, 6)
    assert run_replay(run, "--against", str(other)) == 0
    assert starts == [4, 4]


def test_only_what_is_unknown_is_trained_again(pair, capsys, starts):
    """From the newest checkpoint before it: what is older need not even be in the journal any more."""
    run, other = pair
    for path in (run.path, other):
        forget_weights(path, 1, 3, 4, 5, 6)
        shutil.rmtree(path / "checkpoints" / "step-000004")
        rewrite(path, without_groups(1, 2))
    assert run_replay(run, "--against", str(other)) == 0
    said = capsys.readouterr().out
    assert "the weights of step 3 are not recorded in both" in said
    assert "no difference up to step 6" in said
    assert starts == [2, 2]


def test_a_checkpoint_behind_the_first_unknown_step_is_no_beginning(make, tmp_path, starts):
    """One of a learner that went on by replay is not what the learner recorded that trained its step first."""
    run = make()
    run.begin()
    run.train(1)
    checkpoint = run.save()
    run.train(2, 3)
    run.begin_by_replay(checkpoint)
    run.save()
    run.train(4)
    forget_weights(run.path, 1, 2, 3, 4)
    shutil.copytree(run.path, tmp_path / "other")
    starts.clear()
    assert run_replay(run, "--against", str(tmp_path / "other")) == 0
    assert starts == [1, 1]
