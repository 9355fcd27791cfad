"""What one reward function has come to on N completions, filled in as its calls end. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from protocol.messages import RewardStatus
from rollout_server.rewards.worker import CallResult, Steps

NO_VALUE = float("nan")


class Column:
    """Value, status and seconds of each of `count` completions. Until something is recorded: TIMEOUT, no value.

    That is also what stays of a completion whose turn never came because others used up the time: it is not their
    fault, so `reward_on_timeout` does not apply to it.
    """

    def __init__(self, count: int) -> None:
        self.values = [NO_VALUE] * count
        self.statuses = [RewardStatus.TIMEOUT] * count
        self.seconds = [0.0] * count
        self.steps: dict[int, Steps] = {}
        """Of those it judged step by step."""
        self.note = ""
        """The first thing that went wrong."""

    def record(self, indices: Sequence[int], result: CallResult) -> None:
        """Take over the outcome of a call that returned."""
        self.note = self.note or result.note
        for position, (index, value) in enumerate(zip(indices, result.values, strict=True)):
            if position in result.failed:
                status = RewardStatus.ERROR
            else:
                status = RewardStatus.UNSCORED if value is None else RewardStatus.OK
            self._set(index, NO_VALUE if value is None else value, status, result.seconds / len(indices))
            if position in result.steps:
                self.steps[index] = result.steps[position]

    def timed_out(self, indices: Sequence[int], value: float | None, limit_s: float) -> None:
        """Record a call whose process was killed after `limit_s` seconds; `value` is reward_on_timeout."""
        self.note = self.note or f"killed after {limit_s:g} s, scoring {_counted(indices)}"
        for index in indices:
            seconds = limit_s / len(indices)
            self._set(index, NO_VALUE if value is None else value, RewardStatus.TIMEOUT, seconds)

    def crashed(self, indices: Sequence[int], reason: str) -> None:
        """Record a call that took its process down."""
        self.note = self.note or f"{reason}, scoring {_counted(indices)}"
        for index in indices:
            self._set(index, NO_VALUE, RewardStatus.ERROR, 0.0)

    def _set(self, index: int, value: float, status: RewardStatus, seconds: float) -> None:
        self.values[index], self.statuses[index], self.seconds[index] = value, status, seconds


def _counted(indices: Sequence[int]) -> str:
    return "a completion" if len(indices) == 1 else f"{len(indices)} completions"
