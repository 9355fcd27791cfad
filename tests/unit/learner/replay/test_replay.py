"""Training again what a run has trained: the same bits for every objective, and the step at which they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from learner import journal_segments
from learner.checkpoint import MANIFEST, STATE, latest_checkpoint
from learner.journal_records import GroupRecord, StepRecord
from learner.journal_segments import JournalError
from learner.replay.against import COMPUTED, replayed_difference
from learner.replay.command import replay
from learner.replay.compare import IGNORED
from learner.replay.recorded import RecordedRun
from learner.replay.resume import train_again
from learner.replay.trained_again import Replay, weights_digest
from learner.trainer import Trainer
from protocol.errors import ConfigError
from protocol.versions import PROTOCOL_VERSION
from tests.replays import rewrite, run_replay, with_other_reward

OBJECTIVES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "several updates": {"num_iterations": 2, "num_mini_batches": 2},
    "adaptive kl": {"beta": 0.05, "kl_target": 0.01, "kl_horizon": 20},
    "kl in the reward, following reference": {
        "beta": 0.05, "kl_in": "reward", "sync_ref_model": True, "ref_model_sync_steps": 2,
    },
    "critic": {"advantage_estimator": "gae", "value_learning_rate": 1e-3, "filter_zero_std": False},
    "schedule": {"lr_scheduler_type": "cosine", "warmup_steps": 2, "max_steps": 8, "weight_decay": 0.1},
    "small micro-batches": {"token_budget": 24},
}  # fmt: skip


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_gives_the_same_bits(objective, make, capsys, tmp_path):
    run = make(**OBJECTIVES[objective])
    run.begin()
    run.train(1, 2)
    run.save()
    run.trainer.peak_learning_rate = 1e-3  # a knob
    run.train(3, 4, 5)
    run.save()
    assert set(run.trainer.step_metrics) <= COMPUTED | IGNORED, "two runs are compared by all that the trainer computes"
    assert run_replay(run, "--start", "0") == 0
    said = capsys.readouterr().out
    assert "the same: 5 rows of metrics, 5 published versions, 2 checkpoints" in said
    assert f"step 5 is {run.digest}" in said
    assert run_replay(run, "--to", "4", "--output", str(tmp_path / "out")) == 0
    assert "steps 3 to 4 of" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_the_steps_of_the_last_weights_are_replayed_through_restarts(make, capsys):
    run = make()
    run.begin()
    run.train(1, 2)
    checkpoint = run.save()
    run.train(3, 4)  # left behind
    run.begin(checkpoint, config=run.config.model_copy(update={"token_budget": 24}))
    run.train(3, sampled_by=2)
    run.save()
    run.train(4)
    assert run_replay(run, "--start", "0") == 0
    said = capsys.readouterr().out
    assert "the same: 4 rows of metrics" in said
    assert f"step 4 is {run.digest}" in said


def swap_groups(step: int) -> Any:
    def change(record: Any) -> Any:
        if isinstance(record, StepRecord) and record.step == step:
            first, second, *rest = record.ordinals
            return msgspec.structs.replace(record, ordinals=(second, first, *rest))
        return record

    return change


def change_rate(step: int) -> Any:
    def change(record: Any) -> Any:
        if isinstance(record, StepRecord) and record.step == step:
            return msgspec.structs.replace(record, learning_rate=record.learning_rate * 1.01)
        return record

    return change


CHANGES = {
    "groups": (with_other_reward(7), "step 3: groups: group 7 has other rewards"),
    "order": (swap_groups(3), "step 3: order: 8 7 6 "),
    "rate": (change_rate(3), "step 3: learning rate: 0.003 "),
}


@pytest.mark.parametrize("published", [True, False], ids=["digests recorded", "none recorded"])
@pytest.mark.parametrize("what", CHANGES)
def test_an_altered_journal_is_found_at_that_step(what, published, make, tmp_path, capsys):
    run = make(published=published)
    run.begin()
    run.train(1, 2, 3, 4, 5)
    change, said = CHANGES[what]
    other = tmp_path / "other"
    shutil.copytree(run.path, other)
    assert run_replay(run, "--against", str(other)) == 0
    assert "no difference up to step 5" in capsys.readouterr().out
    rewrite(other, change)
    assert run_replay(run, "--against", str(other)) == 1
    assert f"the first difference is in {said}" in capsys.readouterr().out
    # And without the other run: what is trained again is not what was recorded, from that step on.
    if published:
        assert replay([str(other), "--start", "0"], prog="replay") == 1
        assert "the first difference is in step 3: " in capsys.readouterr().out


def test_weights_that_part_without_a_record_are_found_by_training_both(make, tmp_path, capsys):
    """Two runs that were given the same, one of which computed something else at step 3."""
    one, other = make("one", published=False), make("other", published=False, adam_beta2=0.99)
    for run in (one, other):
        run.begin()
        run.train(1, 2, 3)
        (run.path / "metrics.jsonl").unlink()
    assert run_replay(one, "--against", str(other.path)) == 1
    said = capsys.readouterr().out
    assert "the weights of step 1 are not recorded in both" in said
    assert "the first difference is in step 2: gradients: grad_norm" in said or "step 1: weights: digest" in said


def test_a_gradient_that_is_recorded_otherwise_is_named(make, tmp_path, capsys):
    run = make()
    run.begin()
    run.train(1, 2, 3)
    rows = (run.path / "metrics.jsonl").read_text().splitlines()
    row = msgspec.json.decode(rows[1])
    rows[1] = msgspec.json.encode({**row, "grad_norm": row["grad_norm"] * 1.0001}).decode()
    (run.path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    assert run_replay(run) == 1
    assert "the first difference is in step 2: gradients: grad_norm" in capsys.readouterr().out


def test_a_checkpoint_that_holds_something_else_is_named(make, capsys):
    run = make(published=False)
    run.begin()
    run.train(1)
    with torch.no_grad():
        next(iter(run.trainer._parameters.values())).mul_(1.5)
    run.save()
    (run.path / "metrics.jsonl").unlink()
    assert run_replay(run) == 1
    assert "the first difference is in step 1: weights: model.safetensors" in capsys.readouterr().out


def test_what_the_journal_no_longer_holds_is_refused_with_what_would_do(make):
    run = make()
    run.begin()
    run.train(1, 2)
    run.save()
    run.train(3, 4)
    rewrite_without = {0, 4}
    journal = run.path / "journal"
    records = [r for r in _read(journal) if not (isinstance(r, GroupRecord) and r.group.ordinal in rewrite_without)]
    for path in journal.iterdir():
        path.unlink()
    run.write(*records)
    with pytest.raises(ConfigError, match=r"step 2 cannot be trained again; its journal leads from 2 \(step-000002\)"):
        run_replay(run, "--to", "2")
    with pytest.raises(ConfigError, match=r"start 1: there is no checkpoint of that step; its journal leads from 2"):
        run_replay(run, "--start", "1")
    assert run_replay(run) == 0


def test_a_replay_stops_where_it_is_told(make):
    run = make()
    run.begin()
    digests = []
    for step in range(1, 5):
        run.train(step)
        digests.append(run.digest)
    again = Replay(RecordedRun(run.path), 0)
    assert [step.outcome.weights for step in again.train(3)] == digests[:3]
    assert weights_digest(again.trainer, "xxh3_128") == digests[2]


def test_a_journal_of_another_version_is_refused_by_number(make, monkeypatch):
    run = make()
    with monkeypatch.context() as other:
        other.setattr(journal_segments, "PROTOCOL_VERSION", 4711)
        run.begin()
        run.train(1)
    said = rf"journal format 1 and protocol version 4711; this headway has 1 and {PROTOCOL_VERSION}"
    with pytest.raises(JournalError, match=said):
        run_replay(run)


def test_no_run_directory_is_one_clear_error(tmp_path):
    with pytest.raises(ConfigError, match="is no run directory"):
        replay([str(tmp_path)], prog="replay")
    with pytest.raises(ConfigError, match="no run directory: replay RUN_DIR"):
        replay([], prog="replay")


def _read(journal: Path) -> list[Any]:
    from learner.journal_segments import read_journal

    return list(read_journal(journal))


def test_two_runs_that_were_given_the_same_do_not_differ(make, capsys):
    """Though each has its own times in metrics.jsonl."""
    one, other = make("one"), make("other")
    for run in (one, other):
        run.begin()
        run.train(1, 2)
    assert run_replay(one, "--against", str(other.path)) == 0
    assert "no difference up to step 2" in capsys.readouterr().out


def _alter(path: Path, **fields: Any) -> None:
    path.write_bytes(msgspec.json.encode({**msgspec.json.decode(path.read_bytes()), **fields}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a manifest that is none": lambda path: (path / MANIFEST).write_text('{"files": '),
    "a manifest of another format": lambda path: _alter(path / MANIFEST, format_version=9, more=1),
    "a manifest that says something else": lambda path: _alter(path / MANIFEST, incarnation=7),
    "no manifest": lambda path: (path / MANIFEST).unlink(),
    "a state that is none": lambda path: (path / STATE).write_text('{"forks": '),
    "a state that says something else": lambda path: _alter(path / STATE, forks=[[7, 0]]),
    "a tensor of other bytes": lambda path: _flip_last_byte(path / "model.safetensors"),
}


def _flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_is_no_start_that_was_asked_for(make):
    run = make()
    run.begin()
    run.train(1)
    _flip_last_byte(run.save() / "model.safetensors")
    run.train(2)
    with pytest.raises(
        ConfigError, match=r"start 1: checkpoint step-000001 passed over: model\.safetensors does not hash"
    ):
        run_replay(run, "--start", "1")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(damage, make, capsys):
    run = make()
    run.begin()
    run.train(1, 2)
    run.save()
    run.train(3)
    newest = run.save()
    run.train(4)
    DAMAGES[damage](newest)
    assert run_replay(run) == 0
    said = capsys.readouterr().out
    assert "checkpoint step-000003 passed over: " in said
    assert "steps 3 to 4 of" in said
    assert "the same: 2 rows of metrics" in said


def test_two_runs_are_not_compared_from_a_damaged_checkpoint(make):
    one, other = make("one"), make("other")
    for run in (one, other):
        run.begin()
        run.train(1, 2)
        newest = run.save()
        run.train(3)
    _flip_last_byte(newest / "model.safetensors")
    runs = RecordedRun(one.path), RecordedRun(other.path)
    assert replayed_difference(*runs, [3], ("one", "other")) is None, "from the initial weights they are the same"
    assert [refused.partition(" passed")[0] for refused in runs[1].refused] == ["checkpoint step-000002"]


def test_a_learner_goes_on_by_replay_though_the_newest_checkpoint_is_damaged(make):
    run = make()
    run.begin()
    run.train(1)
    run.save()
    run.train(2)
    (run.save() / MANIFEST).write_text("{")
    run.train(3)
    found = latest_checkpoint(run.path / "checkpoints")
    assert found is not None
    trainer = Trainer(run.config, checkpoint=found.path)
    replayed = train_again(trainer, run.config)
    assert (found.policy_version, trainer.policy_version, replayed.difference) == (1, 3, None)
    assert weights_digest(trainer, "xxh3_128") == run.digest
