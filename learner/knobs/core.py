"""The live knobs: which there are, what each may be set to, and what each is set to now. Pure.

    depth            how many steps rollouts run ahead (S at most). Lower: the learner grants nothing until the slots in
                     use are within the new limit; nothing is cancelled. max_staleness, the bound itself, never changes.
    concurrency      training samples that one server is leased at most; 0: no limit beyond its room
    learning_rate    the peak, that warm-up and schedule scale

A change is a KnobRecord: journaled before it takes effect, kept in every checkpoint after it. `Knobs` is nothing but
the records in order, so what the values are now follows from what the audit says, and cannot differ from it.

A value holds as long as the configuration says what it said when the value was set: who continues a run with another
learning_rate gets that one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from learner.journal_records import KnobRecord
from learner.staleness import Bounds
from protocol.errors import ConfigError


class Knob(StrEnum):
    """What may be turned."""

    DEPTH = "depth"
    CONCURRENCY = "concurrency"
    LEARNING_RATE = "learning_rate"


class KnobRefused(ConfigError):
    """There is no such knob, or it may not be set to that. Names what is allowed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobRange:
    """What a knob may be set to."""

    lowest: float
    highest: float
    configured: float
    """What the configuration says."""
    whole: bool = True
    or_zero: bool = False
    """0 is allowed, too: no limit."""
    why: str = ""
    """Where the range comes from."""

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{'0 (no limit), or ' if self.or_zero else ''}{self.lowest:g} to {self.highest:g}{self.why}"

    def holds(self, value: float) -> bool:
        """Whether the knob may be set to it."""
        if self.whole and not float(value).is_integer():
            return False
        return (self.or_zero and value == 0) or self.lowest <= value <= self.highest


MAX_CONCURRENCY = 1 << 20
LEARNING_RATES = (1e-12, 1.0)


def knob_ranges(bounds: Bounds, *, num_generations: int, learning_rate: float) -> dict[Knob, KnobRange]:
    """Say what each knob may be set to in a run.

    Args:
        bounds: the run's, as granted.
        num_generations: a server that may hold less than one group would never get one.
        learning_rate: the configured peak.
    """
    lowest, highest = bounds.lowest_depth, bounds.steps_ahead
    why = f" (S = {highest} of max_staleness {bounds.max_staleness}"
    why += f"; below {lowest}, weight_sync_steps {bounds.weight_sync_steps} would deadlock)" if lowest else ")"
    return {
        Knob.DEPTH: KnobRange(lowest=lowest, highest=highest, configured=highest, why=why),
        Knob.CONCURRENCY: KnobRange(
            lowest=num_generations, highest=MAX_CONCURRENCY, configured=0, or_zero=True,
            why=" samples (at least one group)",
        ),
        Knob.LEARNING_RATE: KnobRange(
            lowest=LEARNING_RATES[0], highest=LEARNING_RATES[1], configured=learning_rate, whole=False
        ),
    }  # fmt: skip


class Knobs:
    """The values, and the changes that led to them.

    Args:
        ranges: of the run.
        history: changes made before, by earlier learners of this run, in order.
    """

    def __init__(self, ranges: dict[Knob, KnobRange], history: Iterable[KnobRecord] = ()) -> None:
        self.ranges = ranges
        self.history: list[KnobRecord] = []
        self._values = {knob: range_.configured for knob, range_ in ranges.items()}
        for record in history:
            self.turned(record)

    @property
    def depth(self) -> int:
        """Steps that rollouts may run ahead."""
        return int(self._values[Knob.DEPTH])

    @property
    def concurrency(self) -> int:
        """Training samples per server; 0: no limit."""
        return int(self._values[Knob.CONCURRENCY])

    @property
    def learning_rate(self) -> float:
        """The peak."""
        return self._values[Knob.LEARNING_RATE]

    def __getitem__(self, knob: Knob) -> float:
        """The value of a knob."""
        return self._values[knob]

    def change(
        self, name: str, value: float, *, who: Literal["user", "controller"], reason: str, step: int, incarnation: int
    ) -> KnobRecord:
        """Make the record of a change; nothing has changed before `turned` is told of it.

        Args:
            name: of the knob.
            value: what to set it to.
            who: a person's command, or a controller of the learner's own.
            reason: why, in words; may be empty.
            step: policy_version of the weights.
            incarnation: of the learner.

        Raises:
            KnobRefused: no such knob, or outside its range.
        """
        if name not in list(Knob):
            raise KnobRefused(f"there is no knob {name!r}: allowed are {', '.join(Knob)}")
        knob = Knob(name)
        allowed = self.ranges[knob]
        if not allowed.holds(value):
            raise KnobRefused(f"{knob} {value:g} is refused: allowed is {allowed}; now it is {self[knob]:g}")
        return KnobRecord(
            incarnation=incarnation, name=knob.value, value=int(value) if allowed.whole else float(value),
            number=len(self.history) + 1, old=self[knob], configured=allowed.configured, who=who, reason=reason,
            step=step,
        )  # fmt: skip

    def turned(self, record: KnobRecord) -> None:
        """A change takes effect, here or (on a restart) has before."""
        self.history.append(record)
        allowed = self.ranges[Knob(record.name)]
        if record.configured == allowed.configured and allowed.holds(record.value):
            self._values[Knob(record.name)] = record.value

    def metrics(self) -> dict[str, float]:
        """What a row of metrics.jsonl shows."""
        return {f"knobs/{knob}": value for knob, value in self._values.items()}


def joined_history(saved: Iterable[KnobRecord], journaled: Iterable[KnobRecord]) -> list[KnobRecord]:
    """Put a checkpoint's records and the journal's, which overlap, into one history."""
    return list({record.number: record for record in (*saved, *journaled)}.values())
