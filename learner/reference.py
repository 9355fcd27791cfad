"""The frozen policy that the KL penalty pulls towards: the configured model as it was before the first step.

It exists only where beta > 0, and runs the very rows that the policy runs, without gradients. Where an adapter trains,
it is the policy's own base model, and costs no memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.config import LearnerConfig
from learner.model.adapters import Adapter
from learner.model.load import load_model
from learner.model.packing import MicroBatch, StepTokens
from learner.model.policy import Policy


class Reference:
    """Weights from config.model, also when the run is continued from a checkpoint; they never change.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, config: LearnerConfig, *, device: torch.device, share_prefix: bool) -> None:
        model = load_model(config.model, dtype=config.dtype, device=device).requires_grad_(False)
        self._policy = Policy(model, share_prefix=share_prefix, autocast=config.autocast == "bfloat16")

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step that train."""
        return self._policy.step_logprobs(step, micro_batches)


class BaseReference:
    """The policy without its adapter."""

    def __init__(self, policy: Policy, adapter: Adapter) -> None:
        self._policy, self._adapter = policy, adapter

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step that train."""
        with self._adapter.disabled():
            return self._policy.step_logprobs(step, micro_batches)


def make_reference(config: LearnerConfig, policy: Policy, adapter: Adapter | None) -> Reference | BaseReference | None:
    """Make the reference that the configuration needs; none where beta is 0.

    Raises:
        ConfigError: the model cannot be loaded.
    """
    if not config.beta:
        return None
    if adapter is not None:
        return BaseReference(policy, adapter)
    return Reference(config, device=policy.device, share_prefix=policy.shares_prefix)
