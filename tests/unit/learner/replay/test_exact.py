"""Held to its bits is only what was computed as it is computed here: nothing else is accused of a difference."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from learner.config import LearnerConfig
from learner.journal_records import IncarnationRecord, Numerics, StepRecord
from learner.replay import trained_again
from learner.replay.recorded import RecordedRun
from learner.replay.resume import train_again
from learner.replay.trained_again import Replay, weights_digest
from learner.trainer import Trainer
from learner.weights_archive.archive import VERSIONS
from tests.replays import LiveRun, rewrite, run_replay

OTHER_NUMERICS: dict[str, dict[str, Any]] = {"device": {"device": "cuda"}, "threads": {"num_threads": 7}}


def other(numerics: Numerics, what: str) -> Numerics:
    return msgspec.structs.replace(numerics, **OTHER_NUMERICS[what])


def with_other_weights(run: LiveRun) -> None:
    """What another machine gives: not the digests of this one."""
    path = run.path / "weights" / VERSIONS
    rows = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
    path.write_bytes(b"".join(msgspec.json.encode({**row, "digest": "xxh3_128:00"}) + b"\n" for row in rows))


def prune(run: LiveRun, *, before: int) -> None:
    """Lose the beginnings of the journal, as a run of several segments does."""

    def change(record: Any) -> Any:
        old = isinstance(record, IncarnationRecord) or (isinstance(record, StepRecord) and record.step < before)
        return None if old else record

    rewrite(run.path, change)


@pytest.mark.parametrize("what", OTHER_NUMERICS)
def test_a_run_that_computed_otherwise_is_not_held_to_its_bits(what, make, capsys):
    run = make()
    run.begin()
    run.train(1, 2)
    if what == "threads":  # of two learners: a replay takes the first one's number
        run.begin(run.save(), numerics=other(run.trainer.numerics, what))
        run.train(3)
    else:
        rewrite(run.path, lambda record: _on_another(record, what))
    with_other_weights(run)
    assert run_replay(run, "--start", "0") == 0
    said = capsys.readouterr().out
    assert "bits may differ" in said
    assert "rows of metrics, 0 published versions" in said


def _on_another(record: Any, what: str) -> Any:
    if isinstance(record, IncarnationRecord) and record.numerics is not None:
        return msgspec.structs.replace(record, numerics=other(record.numerics, what))
    return record


def test_what_a_run_computed_on_is_known_though_its_journal_is_pruned(make, capsys):
    run = make()
    run.begin(numerics=Numerics(device="cuda", num_threads=1, ranks=1, torch="2"))
    run.train(1, 2)
    run.save()
    run.train(3)
    prune(run, before=3)
    with_other_weights(run)
    assert run_replay(run) == 0
    assert "bits may differ" in capsys.readouterr().out
    (run.path / "config.json").write_text(run.config.model_copy(update={"token_budget": 24}).model_dump_json())
    again = RecordedRun(run.path)
    assert again.config_of(1).token_budget == run.config.token_budget, "the last learner's is in config.json"
    assert again.numerics_of(1) == run.incarnations[0].numerics


def test_what_nobody_recorded_is_not_held_to_its_bits(make):
    """A checkpoint of an older headway knows no beginnings; nor does the journal any more."""
    run = make()
    run.begin()
    run.train(1, 2)
    assert Replay(RecordedRun(run.path), 0).exact
    run.incarnations = ()
    run.save()
    run.train(3)
    prune(run, before=3)
    assert not Replay(RecordedRun(run.path), 2).exact


FIRST: dict[str, Any] = {key: LearnerConfig.model_fields[key].default for key in ("token_budget", "share_prefix")}
CUTS: dict[str, dict[str, Any]] = {"token_budget": {"token_budget": 24}, "share_prefix": {"share_prefix": False}}


@pytest.mark.parametrize("cut", CUTS)
def test_steps_that_the_run_trained_in_two_ways_are_not_held_to_their_bits(cut, make, capsys):
    """A learner goes on by replay with other micro-batches: its weights are not those that the first one recorded."""
    run = make()
    run.begin()
    run.train(1, 2)
    checkpoint = run.save()
    run.train(3, 4)
    replayed = run.begin_by_replay(checkpoint, run.config.model_copy(update=CUTS[cut]))
    assert (replayed.steps, replayed.difference) == (2, None)
    run.train(5)
    run.save()
    for start in ("0", "2"):
        assert run_replay(run, "--start", start) == 0
        assert "bits may differ" in capsys.readouterr().out
    run.train(6)
    assert run_replay(run, "--start", "5") == 0
    assert "bits may differ" not in capsys.readouterr().out, "after its checkpoint everything was trained once"
    # The next learner cuts as the first one did: 3 and 4 have its bits, but what is recorded of 5 has not.
    last = run.begin_by_replay(checkpoint, run.config.model_copy(update=FIRST))
    assert (last.steps, last.difference) == (4, None)


def test_a_learner_that_goes_on_by_replay_is_held_to_the_bits_up_to_the_first_other_cut(make):
    run = make()
    run.begin()
    run.train(1)
    checkpoint = run.save()
    run.train(2, 3)
    run.begin(run.save(), run.config.model_copy(update={"token_budget": 24}))
    run.train(4)
    with_other_weights(run)
    (run.path / "metrics.jsonl").unlink()
    replayed = run.begin_by_replay(checkpoint, run.config.model_copy(update=FIRST))
    assert replayed.steps == 3
    assert replayed.difference is not None
    assert (replayed.difference.step, replayed.difference.what) == (2, "weights")


@pytest.mark.parametrize(("published", "hashed"), [(True, 2), (False, 0)])
def test_going_on_by_replay_hashes_only_what_can_be_compared(published, hashed, make, monkeypatch):
    run = make(published=published)
    run.begin()
    run.train(1)
    checkpoint = run.save()
    run.train(2, 3)
    digests: list[str] = []

    def hashes(*args: Any) -> str:
        digests.append(weights_digest(*args))
        return digests[-1]

    monkeypatch.setattr(trained_again, "weights_digest", hashes)
    replayed = train_again(Trainer(run.config, checkpoint=checkpoint), run.config)
    assert (replayed.steps, replayed.difference, len(digests)) == (2, None, hashed)
    rewrite(run.path, lambda record: _on_another(record, "device"))  # the checkpoint's record is not the newest
    train_again(Trainer(run.config, checkpoint=checkpoint), run.config)
    assert len(digests) == hashed, "not exact: nothing to compare"


def test_other_bits_of_a_step_are_those_of_all_that_follow(make):
    run = make()
    run.begin()
    run.train(1)
    checkpoint = run.save()
    run.begin(checkpoint, run.config.model_copy(update={"token_budget": 24}))
    run.train(2)
    run.begin(run.save(), run.config.model_copy(update=FIRST))
    run.train(3)
    replayed = run.begin_by_replay(checkpoint)
    assert (replayed.steps, replayed.difference) == (2, None)
