"""The frozen policy that the KL penalty pulls towards: the configured model as it was before the first step.

It exists only where beta > 0, and runs the very rows that the policy runs, without gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from learner.config import LearnerConfig
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
        self._policy = Policy(
            model,
            share_prefix=share_prefix,
            autocast=config.autocast == "bfloat16",
            fp32_head=config.cast_lm_head_to_fp32,
            flex_attention=config.attn_implementation == "flex_attention",
        )

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step that train."""
        return self._policy.step_logprobs(step, micro_batches)
