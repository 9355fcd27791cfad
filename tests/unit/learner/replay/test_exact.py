"""Held to its bits is only what was computed as it is computed here: nothing else is accused of a difference."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from learner.journal_records import IncarnationRecord, Numerics, StepRecord
from learner.replay.recorded import RecordedRun
from learner.replay.trained_again import Replay
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
