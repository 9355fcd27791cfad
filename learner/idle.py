"""Why a side stood still: idle time, integrated between events and given to a named cause. Pure.

Two questions, asked anew at every change of the learner's state:

    why does the train loop wait?        `why_learner_waits`, while it waits
    why is nothing more leased?          `why_not_leased`, always; seats that stand empty for want of a lease are split
                                         by it (seats.py of the server says how many those are)

`IdleTime` integrates the answers: the seconds from one event to the next go to the cause that held meanwhile, so causes
sum to the whole. `describe` says what would help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Generic, TypeVar

Cause = TypeVar("Cause", bound=str)
SAID, WORTH_SAYING = 2, 0.2
"""At most so many causes are said, each of at least this share of all idle time."""
FULL = 0.9
"""Share of all seats from which on the servers count as full: between two samples a seat is empty for a moment."""


class LearnerWaits(StrEnum):
    """For what the train loop waits."""

    NO_SERVER = "no_server"
    """None is connected, or those that are have fallen silent, or drain."""
    WEIGHTS = "weights"
    """No server has the weights that the next leases need, yet."""
    ROLLOUTS = "rollouts"
    """All seats are full: they sample as fast as they can."""
    BOUND = "bound"
    """Seats are free, but every slot is in use: max_staleness allows no more groups."""
    STRAGGLER = "straggler"
    """Enough groups are finished, but the reorder window keeps them behind an older one that is not."""
    FILTERED = "filtered"
    """The batch would be full, had none of its groups been filtered."""
    DATA = "data"
    """The next prompts are not ready."""
    DISK = "disk"
    """The batch would be full, were its groups journaled."""
    EVALUATION = "evaluation"
    """An evaluation has the servers."""
    PUBLISH = "publish"
    """The snapshot of the previous weights is not complete."""


class NotLeased(StrEnum):
    """Why nothing more is leased."""

    BOUND = "bound"
    DATA = "data"
    WEIGHTS = "weights"
    SENT = "sent"
    """The servers have been sent all that they take at once: their seats wait for samples of groups that they have."""
    EVALUATION = "evaluation"
    """A pinned evaluation holds new weights back."""
    NO_TRAINING = "no_training"
    """Training has ended, or has not begun."""


LEARNER_WAITS: Mapping[LearnerWaits, tuple[str, str]] = {
    LearnerWaits.NO_SERVER: ("no rollout server", "keep one connected"),
    LearnerWaits.WEIGHTS: ("new weights on their way to servers", "a faster link, or raise max_staleness"),
    LearnerWaits.ROLLOUTS: ("rollouts too slow", "add servers"),
    LearnerWaits.BOUND: ("the bound", "raise max_staleness"),
    LearnerWaits.STRAGGLER: (
        "stragglers", "raise max_staleness, or shorten max_completion_length",
    ),
    LearnerWaits.FILTERED: ("filtered groups", "easier or harder prompts, or filter_zero_std = false"),
    LearnerWaits.DATA: ("prompts not ready", "a faster data set"),
    LearnerWaits.DISK: ("the journal's disk", "a faster disk under output_dir"),
    LearnerWaits.EVALUATION: ("evaluations", "a larger eval_steps or a smaller eval_size"),
    LearnerWaits.PUBLISH: ("publishing weights", "a larger weight_sync_steps, or staging_dir in memory"),
}  # fmt: skip
"""Of each cause: its name in a sentence, and what would help."""

EMPTY_SEATS: Mapping[str, tuple[str, str]] = {
    "rollout/lease_bound_s": ("every slot in use", "the learner is the slower side: fewer servers are enough"),
    "rollout/lease_sent_s": ("long samples of groups under way", "a shorter max_completion_length, or less room"),
    "rollout/lease_weights_s": ("new weights on their way", "a faster link, or a larger max_staleness"),
    "rollout/lease_data_s": ("prompts not ready", "a faster data set"),
    "rollout/lease_evaluation_s": ("an evaluation of one version", "a larger eval_steps or a smaller eval_size"),
    "rollout/lease_no_training_s": ("training not going on", "nothing to do"),
    "rollout/empty_engine_s": ("swaps, prompts or a full cache", "a larger weight_sync_steps, or less room"),
    "rollout/empty_rewards_s": ("reward functions", "more reward_workers"),
    "rollout/empty_no_weights_s": ("servers without weights", "a faster link to the learner"),
}
"""Same for seats that stood empty, by column of metrics.jsonl. Their seconds sum to all that were empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What decides, as of now."""

    prompts_per_step: int
    servers: int
    """Connected, and neither silent nor draining."""
    healthy: int
    """Of those, live at some version."""
    seats: int
    seats_taken: int
    """Samples in the engines, as they last said."""
    free_slots: bool
    rows_ready: bool
    unplaced: bool
    """A group waits for a server that may take it."""
    admissible: bool
    """Whether any server has the weights that it needs."""
    arriving: int
    """Groups here and not yet on disk."""
    buffered: int
    filtered: int
    """Since the last batch."""
    evaluating: bool
    pinned: bool
    """The evaluation holds new weights back."""

    @property
    def full(self) -> bool:
        """Whether the engines sample as much at once as they can."""
        return self.seats_taken >= FULL * self.seats


def why_learner_waits(now: Situation) -> LearnerWaits:
    """Say what keeps the next batch from forming. The first that holds, in the order of what would have to go first."""
    if not now.healthy:
        return LearnerWaits.WEIGHTS if now.servers else LearnerWaits.NO_SERVER
    if now.arriving and now.buffered + now.arriving >= now.prompts_per_step:
        return LearnerWaits.DISK
    if now.buffered >= now.prompts_per_step:
        return LearnerWaits.STRAGGLER
    if now.pinned or (now.evaluating and now.full):
        return LearnerWaits.EVALUATION
    if now.free_slots and not (now.rows_ready or now.unplaced):
        return LearnerWaits.DATA
    if now.unplaced and not now.admissible:
        return LearnerWaits.WEIGHTS
    if now.filtered and now.buffered + now.filtered >= now.prompts_per_step:
        return LearnerWaits.FILTERED
    if now.full or now.free_slots or now.unplaced:
        return LearnerWaits.ROLLOUTS
    return LearnerWaits.BOUND


def why_not_leased(*, training: bool, unplaced: bool, admissible: bool, pinned: bool, free_slots: bool) -> NotLeased:
    """Say what keeps the learner from leasing more; the words are those of `Situation`."""
    if not training:
        return NotLeased.NO_TRAINING
    if unplaced and not admissible:
        return NotLeased.EVALUATION if pinned else NotLeased.WEIGHTS
    if unplaced:
        return NotLeased.SENT
    return NotLeased.DATA if free_slots else NotLeased.BOUND


class IdleTime(Generic[Cause]):
    """Seconds by cause. While the cause is None nothing is counted.

    Example:
        >>> idle = IdleTime[NotLeased](now_s=0)
        >>> idle.switch(NotLeased.BOUND, now_s=2)
        >>> idle.switch(None, now_s=5)
        >>> idle.take(now_s=9)
        {<NotLeased.BOUND: 'bound'>: 3}
    """

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._cause: Cause | None = None
        self._taken: dict[Cause, float] = {}

    def switch(self, cause: Cause | None, now_s: float) -> None:
        """From now on it is that cause; up to now it was the one before."""
        if self._cause is not None and now_s > self._since_s:
            self._taken[self._cause] = self._taken.get(self._cause, 0) + now_s - self._since_s
        self._since_s, self._cause = now_s, cause

    def take(self, now_s: float) -> dict[Cause, float]:
        """Return the seconds since the last call. Their sum is the time in which there was a cause."""
        self.switch(self._cause, now_s)
        taken, self._taken = self._taken, {}
        return taken


def split(seconds: float, shares: Mapping[Cause, float]) -> dict[Cause, float]:
    """Divide seconds of servers by what kept the learner from leasing in the same interval, in proportion."""
    whole = sum(shares.values())
    return {cause: seconds * share / whole for cause, share in shares.items()} if whole else {}


def describe(seconds: Mapping[Cause, float], words: Mapping[Cause, tuple[str, str]], whole_s: float) -> str:
    """Name the causes that matter, largest first, with their share of `whole_s` and what would help.

    Example:
        >>> describe({LearnerWaits.ROLLOUTS: 3.0, LearnerWaits.DISK: 0.1}, LEARNER_WAITS, whole_s=10.0)
        'rollouts too slow 30 %: add servers'
    """
    total = sum(seconds.values())
    ranked = sorted(seconds.items(), key=lambda item: -item[1])[:SAID]
    return "; ".join(
        f"{words[cause][0]} {100 * spent / whole_s:.0f} %: {words[cause][1]}"
        for cause, spent in ranked
        if spent > WORTH_SAYING * total
    )
