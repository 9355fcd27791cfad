"""Where two runs part: the first step that is not the same in both, and what of it is not.

Compared is first what was recorded: what a step was given (rate, order, groups), then what came of it (metrics, the
digest of the weights). Where a run has not recorded its weights, both are trained again, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from learner.batch import Batch, TrainGroup
from learner.replay.compare import Difference, Outcome, difference
from learner.replay.index import batches
from learner.replay.recorded import RecordedRun
from protocol.errors import ConfigError

TRAINS = (
    "completion_tokens", "completion_lengths", "behavior_logprobs", "rewards", "scored", "finish_reasons", "loss_mask",
    "step_rewards",
)  # fmt: skip
"""Arrays of a group that the trainer looks at; the versions of its tokens come on top."""
COMPUTED = frozenset({
    "loss", "grad_norm", "entropy", "kl", "beta", "policy_kl", "effective_sample_size", "ratio/mean", "ratio/max",
    "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "cispo_clip_ratio", "num_updates",
    "importance_weight/mean", "importance_weight/masked", "completion_tokens", "value_loss", "value_grad_norm",
    "value_clip_ratio", "value/mean", "value/explained_variance",
})  # fmt: skip
"""Metrics that the trainer computes."""


def first_difference(
    one: RecordedRun, other: RecordedRun, *, to: int | None, tell: Callable[[str], None]
) -> tuple[Difference | None, int]:
    """Return the first difference of two runs, and the last step that was compared.

    Args:
        one: a run.
        other: another one.
        to: step to end with; the last one that both have, if None.
        tell: is given what to show meanwhile.

    Raises:
        ConfigError: they have no step in common; or nothing recorded differs, and what is not recorded cannot be
            trained again.
    """
    both = sorted(one.index.steps.keys() & other.index.steps.keys())
    common = [step for step in both if to is None or step <= to]
    if not common:
        raise ConfigError(f"{one.path} and {other.path} have no journaled step in common{f' up to {to}' if to else ''}")
    names = (str(one.path), str(other.path))
    found = recorded_difference(one, other, common, names)
    before = [step for step in common if found is None or step < found.step]
    known = max((step for step in before if _comparable(one.outcome(step), other.outcome(step))), default=0)
    unknown = [step for step in before if step > known]  # equal weights are those of equal steps before
    if unknown:
        tell(f"the weights of step {unknown[0]} are not recorded in both: training them again, side by side")
        try:
            found = replayed_difference(one, other, unknown, names) or found
        except ConfigError as error:
            if found is None:
                raise
            tell(f"{error}: what follows is the first difference that was recorded")
    return found, common[-1]


def recorded_difference(
    one: RecordedRun, other: RecordedRun, steps: list[int], names: tuple[str, str]
) -> Difference | None:
    """Compare what the runs recorded of these steps; groups only where both journals still have them."""
    whole = [step for step in steps if one.index.steps[step].whole and other.index.steps[step].whole]
    pairs = _pairs(one, other, whole)
    for step in steps:
        ours, theirs = (_computed(run.outcome(step)) for run in (one, other))
        if ours.learning_rate != theirs.learning_rate:
            return difference(step, ours, theirs, exact=True, names=names)
        orders = [run.index.steps[step].record.ordinals for run in (one, other)]
        if orders[0] != orders[1]:
            what = "order" if sorted(orders[0]) == sorted(orders[1]) else "groups"
            text = f"{_list(orders[0])} {names[0]}, {_list(orders[1])} {names[1]}"
            return Difference(step=step, what=what, text=text)
        if step in whole and (text := _groups_differ(*next(pairs))):
            return Difference(step=step, what="groups", text=text)
        if found := difference(step, ours, theirs, exact=True, names=names):
            return found
    return None


def replayed_difference(
    one: RecordedRun, other: RecordedRun, steps: list[int], names: tuple[str, str]
) -> Difference | None:
    """Train both again from their last common checkpoint before these steps, and compare step by step.

    Raises:
        ConfigError: from none before the first of them have both journals every step up to the last.
    """
    from learner.replay.trained_again import Replay

    starts = [start for start in (0, *one.checkpoints) if start == 0 or start in other.checkpoints]
    first, last = steps[0], steps[-1]
    usable = [s for s in starts if s < first and last <= min(one.index.last_after(s), other.index.last_after(s))]
    start = next((s for s in sorted(usable, reverse=True) if one.intact(s) and other.intact(s)), None)
    if start is None:
        raise ConfigError(
            f"steps {first} to {last} cannot be trained again in both: {one.path}: {one.reach()}; {other.path}:"
            f" {other.reach()}"
        )
    replays = [Replay(run, start) for run in (one, other)]
    for ours, theirs in zip(*(replay.train(last) for replay in replays), strict=True):
        found = difference(ours.batch.step, ours.outcome, theirs.outcome, exact=True, names=names)
        if found:
            return found
    return None


def _computed(outcome: Outcome) -> Outcome:
    """Leave the trainer's metrics alone in a row: times and servers are never those of another run."""
    return replace(outcome, metrics={name: value for name, value in outcome.metrics.items() if name in COMPUTED})


def _comparable(one: Outcome, other: Outcome) -> bool:
    """Whether equal records mean equal weights: both were hashed in the same way, or are in a checkpoint of both."""
    if any("model" in name for name in one.files.keys() & other.files.keys()):
        return True
    a, b = one.weights.partition(":")[0], other.weights.partition(":")[0]
    return bool(a) and a == b


def _pairs(one: RecordedRun, other: RecordedRun, steps: list[int]) -> Iterator[tuple[Batch, Batch]]:
    journals = (batches(run.path / "journal", [run.index.steps[step] for step in steps]) for run in (one, other))
    return zip(*journals, strict=True)


def _groups_differ(one: Batch, other: Batch) -> str:
    """Say which group of two batches of the same order is not the same; empty for none."""
    for ours, theirs in zip(one.groups, other.groups, strict=True):
        if what := _group_differs(ours, theirs):
            return f"group {ours.ordinal} has other {what}"
    return ""


def _group_differs(one: TrainGroup, other: TrainGroup) -> str:
    if not np.array_equal(one.prompt_tokens, other.prompt_tokens):
        return "prompt_tokens"
    for name in TRAINS:
        a, b = getattr(one.group, name), getattr(other.group, name)
        if (a is None) != (b is None) or (a is not None and a.tobytes() != b.tobytes()):
            return name
    if one.group.temperature != other.group.temperature:
        return "temperature"
    ages, others = one.group.span_versions[:, 1], other.group.span_versions[:, 1]
    return "" if np.array_equal(ages, others) else "versions of its tokens"


def _list(ordinals: tuple[int, ...]) -> str:
    return " ".join(map(str, ordinals))
