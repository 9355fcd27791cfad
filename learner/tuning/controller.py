"""`staleness_control = "auto"`: how many steps rollouts run ahead, moved by what the steps show. Pure.

Inside the hard bound: from k - 1 (weight_sync_steps) to S, never outside. One number decides whether running further
ahead could help at all:

    slack = the smaller of the share of time the learner waits and the share of the servers' room that nobody uses.

Where only one side waits, the other is the bottleneck and no depth makes it faster; where both do, they wait for each
other. So, from the mean over a few steps:

    raise by 1      slack is high, and the data is healthy with room to spare
    lower by 1      slack has been low for a while, or is high and raising does not help: perhaps one step less keeps
                    both sides as busy, with fresher data
    take it back    a raise that did not lower the slack bought nothing; a lowering that raised it cost something

What was taken back is not tried again for a while, twice as long every time (of a lowering at most MOST_PATIENCE, for
nothing shows that less would do now), unless the slack changes by itself: then the run is another one, and everything
may be tried. Constant input therefore brings fewer and fewer moves. And at once, waiting for nothing:

    halve           two steps in a row whose data is no longer good: effective sample size too small, too much clipped,
                    too far from the policy that sampled it

so the depth is below a collapse's within 2 steps and at its lowest within 2 (1 + log2 S). Effective sample size: Kong
(1992), as diagnostics.py computes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WINDOW_STEPS = 4
"""Steps whose mean a decision is made of."""
CALM_STEPS = 8
"""Steps without a move before less is tried: lowering is never urgent."""
PATIENCE_STEPS, MOST_PATIENCE = 32, 128
"""What was taken back is not tried again for so long, at first; and at most, where nothing would show that it might."""
HIGH_SLACK, LOW_SLACK = 0.04, 0.02
"""Above: raise. Below: try less. Between: leave it."""
WORTH = 0.02
"""A raise must lower the slack by so much to stay."""
SHIFTED = 0.1
"""Slack that changes by so much by itself is of another regime."""
BAD_STEPS = 2
"""Steps in a row with bad data until the depth is halved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One trained step; NaN where nothing was measured."""

    step: int
    learner_idle: float
    """Share of the time since the last step in which the learner waited."""
    room_unused: float
    """Share of the servers' room that nobody used in that time."""
    effective_sample_size: float = math.nan
    clip_ratio: float = math.nan
    policy_kl: float = math.nan

    @property
    def slack(self) -> float:
        """See the module's text."""
        return min(self.learner_idle, self.room_unused)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Data beyond any of these is bad; beyond half of the way to it, no reason to raise."""

    effective_sample_size: float = 0.5
    """At least."""
    clip_ratio: float = 0.2
    """At most."""
    policy_kl: float = 0.1
    """Nats, at most."""

    def bad(self, seen: Observation, *, margin: float = 1.0) -> str:
        """Say what is wrong with a step's data, or nothing. `margin` 0.5: what is half way to it."""
        size = 1.0 - margin * (1.0 - self.effective_sample_size)
        if seen.effective_sample_size < size:
            return f"effective sample size {seen.effective_sample_size:.2f} is below {size:.2f}"
        if seen.clip_ratio > margin * self.clip_ratio:
            return f"{seen.clip_ratio:.0%} of the tokens are clipped, more than {margin * self.clip_ratio:.0%}"
        if seen.policy_kl > margin * self.policy_kl:
            return f"policy_kl {seen.policy_kl:.3f} is above {margin * self.policy_kl:.3f}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A change of the depth."""

    step: int
    old: int
    new: int
    reason: str


@dataclass(slots=True)
class Block:
    """Something that was tried and taken back."""

    most: float = math.inf
    patience: int = PATIENCE_STEPS
    until: int = -1
    """Not tried again before this step."""
    slack: float = math.nan
    """As it was then."""

    def shut(self, step: int, slack: float) -> None:
        """Not again for a while, next time for longer."""
        self.until, self.slack = step + self.patience, slack
        self.patience = int(min(self.most, 2 * self.patience))

    def open_if_shifted(self, slack: float) -> None:
        """Another regime: what was learned in the last one does not count."""
        if abs(slack - self.slack) > SHIFTED:
            self.patience, self.until, self.slack = PATIENCE_STEPS, -1, math.nan


@dataclass(slots=True)
class _Trial:
    """The last move, until it has been judged."""

    move: Move
    slack: float
    """Before it."""


@dataclass(kw_only=True)
class DepthController:
    """See the module's text. `decide` is told of every trained step, in order."""

    depth: int
    lowest: int
    highest: int
    limits: Limits = field(default_factory=Limits)
    effect: str = ""
    """What came of the last move; empty until that can be said."""
    _window: list[Observation] = field(default_factory=list)
    _settled_at: int = 0
    """From this step on what is seen is of the depth as it is."""
    _bad: int = 0
    _trial: _Trial | None = None
    _raising: Block = field(default_factory=Block)
    _lowering: Block = field(default_factory=lambda: Block(most=MOST_PATIENCE))
    _collapse: Block = field(default_factory=lambda: Block(most=8 * MOST_PATIENCE))

    def decide(self, seen: Observation) -> Move | None:
        """Take in a step; return the move to make now, which counts as made."""
        problem = self.limits.bad(seen)
        self._bad = self._bad + 1 if problem else 0
        if self._bad >= BAD_STEPS and self.depth > self.lowest:
            self._bad = 0
            self._trial = None
            self._collapse.shut(seen.step, math.nan)
            return self._to(max(self.lowest, self.depth // 2), seen.step, f"{problem}, {BAD_STEPS} steps in a row")
        if seen.step < self._settled_at or math.isnan(seen.slack):
            return None
        self._window = [*self._window[1 - CALM_STEPS :], seen]
        if len(self._window) < WINDOW_STEPS:
            return None
        slack = _mean(lambda one: one.slack, self._window[-WINDOW_STEPS:])
        if self._trial is not None:
            return self._judge(self._trial, seen.step, slack)
        self._raising.open_if_shifted(slack)
        self._lowering.open_if_shifted(slack)
        return self._try(seen.step, slack)

    def turned(self, depth: int, step: int) -> None:
        """Somebody else has set the depth: go on from there."""
        self.depth, self._trial, self._window = depth, None, []
        self._settled_at = step + depth + 2

    def _judge(self, trial: _Trial, step: int, slack: float) -> Move | None:
        """Keep the last move, or take it back."""
        raised, self._trial = trial.move.new > trial.move.old, None
        self.effect = f"depth {trial.move.old} -> {trial.move.new}: slack {trial.slack:.0%} -> {slack:.0%}"
        if raised and slack > trial.slack - WORTH:
            self._raising.shut(step, slack)
            return self._to(trial.move.old, step, f"bought nothing: slack {trial.slack:.0%} before, {slack:.0%} now")
        if not raised and slack > HIGH_SLACK and slack > trial.slack + WORTH:
            self._lowering.shut(step, trial.slack)
            return self._to(trial.move.old, step, f"cost speed: slack {trial.slack:.0%} before, {slack:.0%} now")
        if not raised and slack > HIGH_SLACK:
            self._raising.shut(step, slack)  # more was there, and bought nothing
        return None

    def _try(self, step: int, slack: float) -> Move | None:
        """Raise or lower by one, where that may help and has not just been found not to."""
        more_is_useless = self.depth == self.highest or step < self._raising.until
        recovering = step < self._collapse.until or self._strained()
        if slack > HIGH_SLACK and not more_is_useless and not recovering:
            recent = self._window[-WINDOW_STEPS:]
            idle, unused = _mean(lambda one: one.learner_idle, recent), _mean(lambda one: one.room_unused, recent)
            reason = f"both sides wait: the learner {idle:.0%} of the time, {unused:.0%} of the room is unused"
            return self._to(self.depth + 1, step, reason, slack)
        pointless = slack < LOW_SLACK or (slack > HIGH_SLACK and more_is_useless)
        calm = len(self._window) == CALM_STEPS and step >= self._lowering.until
        if pointless and calm and self.depth > self.lowest:
            return self._to(self.depth - 1, step, f"slack {slack:.0%}: less may do as well", slack)
        return None

    def _strained(self) -> bool:
        """Whether the data is half way to bad."""
        return any(self.limits.bad(one, margin=0.5) for one in self._window[-WINDOW_STEPS:])

    def _to(self, depth: int, step: int, reason: str, slack: float | None = None) -> Move:
        """Move; with `slack`, to be judged by how that changes."""
        move = Move(step=step, old=self.depth, new=depth, reason=reason)
        self.turned(depth, step)
        self._trial = None if slack is None else _Trial(move, slack)
        return move


def observe(row: Mapping[str, Any]) -> Observation:
    """Read a row of metrics.jsonl."""
    return Observation(
        step=row["policy_version"],
        learner_idle=row["learner/idle_ratio"],
        room_unused=1.0 - row["rollout/occupancy"],
        effective_sample_size=row.get("effective_sample_size", math.nan),
        clip_ratio=row.get("clip_ratio/region_mean", row.get("cispo_clip_ratio", math.nan)),
        policy_kl=row.get("policy_kl", math.nan),
    )


def _mean(value: Callable[[Observation], float], seen: list[Observation]) -> float:
    return sum(map(value, seen)) / len(seen)
