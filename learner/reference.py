"""The reference policy that the KL penalty pulls towards: the configured model as it was before the first step.

It exists only where beta > 0, and runs the very rows that the policy runs, without gradients. With sync_ref_model it
follows the policy: replaced every so many steps (iterative GRPO: DeepSeekMath, arXiv 2402.03300, algorithm 1), or as a
moving average of its weights (TR-DPO, arXiv 2404.09656). It is then part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from learner.config import LearnerConfig
from learner.model.export import unique_tensors
from learner.model.load import load_model
from learner.model.packing import MicroBatch, StepTokens
from learner.model.policy import Policy
from protocol.errors import ConfigError

REFERENCE_FILE = "reference.safetensors"


class Reference:
    """Weights from config.model, also when the run is continued from a checkpoint, unless that brings its own.

    Raises:
        ConfigError: the model cannot be loaded.
    """

    def __init__(self, config: LearnerConfig, *, device: torch.device, share_prefix: bool) -> None:
        self._config = config
        self._model = load_model(config.model, dtype=config.dtype, device=device).requires_grad_(False)
        self._policy = Policy(
            self._model,
            share_prefix=share_prefix,
            autocast=config.autocast == "bfloat16",
            fp32_head=config.cast_lm_head_to_fp32,
            flex_attention=config.attn_implementation == "flex_attention",
        )

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step that train."""
        return self._policy.step_logprobs(step, micro_batches)

    def follow(self, model: PreTrainedModel, policy_version: int) -> None:
        """After the step that made `policy_version`: move towards the policy, where it is time.

        reference = alpha x policy + (1 - alpha) x reference   (TR-DPO, arXiv 2404.09656)
        """
        config = self._config
        if not config.sync_ref_model or policy_version % config.ref_model_sync_steps:
            return
        policy = unique_tensors(model)
        for name, tensor in unique_tensors(self._model).items():
            tensor.lerp_(policy[name], config.ref_model_mixup_alpha)

    @property
    def num_parameters(self) -> int:
        """None of them trains."""
        return sum(p.numel() for p in self._model.parameters())

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes, about."""
        tensors = unique_tensors(self._model).values()
        return sum(t.numel() * t.element_size() for t in tensors) if self._config.sync_ref_model else 0

    def save(self, directory: Path) -> None:
        """Write the weights, where they are not those of the configured model."""
        if self._config.sync_ref_model:
            save_file(unique_tensors(self._model), directory / REFERENCE_FILE)

    def load(self, directory: Path) -> None:
        """Read back what `save` wrote; a run that only now begins to follow starts at the configured model.

        Raises:
            ConfigError: the file is damaged, or of another model.
        """
        path = directory / REFERENCE_FILE
        if not self._config.sync_ref_model or not path.exists():
            return
        try:
            saved = load_file(path)
            for name, tensor in unique_tensors(self._model).items():
                tensor.copy_(saved[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} is no reference of this model: {error}") from error
