"""Steps are trained of the groups they were trained of, whatever a living learner prunes meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from learner.journal_segments import list_segments, read_journal
from learner.replay.index import JournalIndex, batches, index_journal
from protocol.errors import ConfigError
from tests.journals import group_record, step, write

STEPS = range(1, 5)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    """Four steps of two groups, each in segments of its own."""
    for number in STEPS:
        ordinals = (2 * number, 2 * number + 1)
        write(tmp_path, *map(group_record, ordinals), step(number, *ordinals), segment_bytes=33)
    return tmp_path


def prune(journal: Path, *, steps: int) -> None:
    """Delete what these first steps are in."""
    for path in list(list_segments(journal).values())[: 3 * steps]:
        path.unlink()


def trained(index: JournalIndex, journal: Path, steps: list[int]) -> dict[int, list[int]]:
    found = batches(journal, [index.steps[number] for number in steps])
    return {batch.step: [group.ordinal for group in batch.groups] for batch in found}


@pytest.mark.parametrize("pruned", [0, 1, 2])
def test_what_is_pruned_behind_the_index_moves_nothing(pruned, journal):
    index = index_journal(journal, ((1, 0),))
    prune(journal, steps=pruned)
    assert trained(index, journal, [3, 4]) == {3: [6, 7], 4: [8, 9]}


@pytest.mark.parametrize("pruned", [1, 3])
def test_steps_that_are_pruned_behind_the_index_are_missed(pruned, journal):
    index = index_journal(journal, ((1, 0),))
    prune(journal, steps=pruned)
    with pytest.raises(ConfigError, match="was cut while it was read, at step 1: the run goes on; replay it again"):
        trained(index, journal, [1, 2, 3, 4])


def test_a_segment_that_goes_while_the_journal_is_read_is_passed_over(journal):
    records = read_journal(journal)
    next(records)
    prune(journal, steps=2)
    assert len(list(records)) == 6, "those of steps 3 and 4"
