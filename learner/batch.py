"""What moves from the buffer to the trainer. Plain data, no tensors: numpy views of the received frames."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from protocol.messages import FinishReason, Float32, Group, Int32

Bool = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainGroup:
    """A finished group with what the trainer needs of its lease. `group` is whole (never a part) and validated."""

    ordinal: int
    sequence: int
    prompt_tokens: Int32
    """[P]"""
    prompt: str
    """For samples/ only: the prompt's text."""
    group: Group

    @property
    def oldest_policy_version(self) -> int:
        """policy_version of the group's oldest token. All versions belong to the lineage (checked on arrival)."""
        return int(self.group.span_versions[:, 1].min())


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The groups of one training step, in the order in which they train."""

    step: int
    """policy_version after the step."""
    groups: tuple[TrainGroup, ...]

    @property
    def staleness(self) -> list[int]:
        """Staleness of each group: of its oldest token, against the weights about to be trained."""
        return [self.step - 1 - group.oldest_policy_version for group in self.groups]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What forward_backward found. When not `finite`, the gradients are gone and the step must be skipped."""

    finite: bool
    reason: str = ""
    """Why not finite: "loss is nan", "gradient norm is inf", ..."""
    loss_tokens: int = 0
    """Tokens that train: the global count of the dapo denominator."""
    metrics: dict[str, float] = field(default_factory=dict)
    """TRL's names: loss, kl, entropy, clip_ratio/low_mean, clip_ratio/high_mean, clip_ratio/region_mean, grad_norm,
    policy_kl, ..."""
    advantages: tuple[tuple[float, ...], ...] = ()
    """Of each group, [G]: 0 for completions that do not train. For samples/; empty when nobody computed them."""


def completions_that_train(group: Group, *, mask_truncated_completions: bool) -> Bool:
    """Tell which completions of a group can train, [G]: scored, not aborted, not empty.

    Args:
        group: whole and validated.
        mask_truncated_completions: leave those out that hit max_completion_length, as if unscored.
    """
    trains_G: Bool = (group.scored > 0) & (group.finish_reasons != FinishReason.ABORT) & (group.completion_lengths > 0)
    if mask_truncated_completions:
        trains_G &= group.finish_reasons != FinishReason.LENGTH
    return trains_G


def step_rewards(group: Group) -> Float32:
    """Return the reward of the step that ends with each token, [T], NaN where none does.

    An outcome is one step that ends with its completion's last token.

    Args:
        group: whole and validated.
    """
    if group.step_rewards is not None:
        return group.step_rewards
    rewards_T: Float32 = np.full(group.completion_tokens.size, np.nan, np.float32)
    judged = (group.scored > 0) & (group.completion_lengths > 0)
    rewards_T[np.cumsum(group.completion_lengths)[judged] - 1] = group.rewards[judged]
    return rewards_T
