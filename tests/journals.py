"""Small journal records for tests, how to compare them, and one-call ways to write and read a journal."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from learner.journal import (
    EndRecord,
    GroupRecord,
    Journal,
    JournalReport,
    KnobRecord,
    Record,
    StepRecord,
    read_journal,
)
from tests.factories import make_group


def group_record(ordinal: int = 0, *, prompt: str = "2 + 3 =", incarnation: int = 1, **fields: Any) -> GroupRecord:
    return GroupRecord(
        incarnation=incarnation,
        prompt=prompt,
        prompt_tokens=np.array([3, 4, 5], np.int32),
        group=make_group(ordinal=ordinal, **fields),
    )


def end(ordinal: int, *, end: str = "filtered") -> EndRecord:
    return EndRecord(incarnation=1, ordinal=ordinal, sequence=ordinal, end=end, step=0, reason="zero std")


def step(number: int, *ordinals: int) -> StepRecord:
    return StepRecord(incarnation=1, step=number, ordinals=ordinals, learning_rate=1e-5, num_micro_batches=2)


def knob(number: int, name: str, value: float, *, old: float = 0, configured: float = 0, step: int = 0) -> KnobRecord:
    return KnobRecord(
        incarnation=1, name=name, value=value, number=number, old=old, configured=configured, who="user", reason="",
        step=step,
    )  # fmt: skip


KNOB = knob(1, "learning_rate", 2e-6, old=1e-6, configured=1e-6)


def plain(record: Record) -> object:
    """A record as comparable values: equal exactly when every array has the same bytes, shape and dtype."""
    if not isinstance(record, GroupRecord):
        return record
    fields: list[object] = [record.incarnation, record.prompt, record.prompt_tokens.tolist()]
    for value in msgspec.structs.astuple(record.group):
        is_array = isinstance(value, np.ndarray)
        fields.append((value.dtype.str, value.shape, value.tobytes()) if is_array else value)
    return fields


def use(directory: Path, action: Callable[[Journal], Coroutine[Any, Any, None]], **options: Any) -> Journal:
    """Open a journal, run `action` on it, close it."""

    async def main() -> Journal:
        journal = Journal.open(directory, **options)
        try:
            await action(journal)
        finally:
            await journal.close()
        return journal

    return asyncio.run(main())


def write(directory: Path, *records: Record, **options: Any) -> Journal:
    """Append records, each in a sync of its own."""

    async def each(journal: Journal) -> None:
        for record in records:
            await journal.append(record)

    return use(directory, each, **options)


def ordinals(directory: Path, report: JournalReport | None = None) -> list[int]:
    """Read back the ordinals of the group records."""
    return [r.group.ordinal for r in read_journal(directory, report) if isinstance(r, GroupRecord)]


def segments(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
