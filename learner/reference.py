"""The reference policy that the KL penalty pulls towards: the configured model as it was before the first step.

It exists only where beta > 0, and runs the very rows that the policy runs, without gradients. With sync_ref_model it
follows the policy: replaced every so many steps (iterative GRPO: DeepSeekMath, arXiv 2402.03300, algorithm 1), or as a
moving average of its weights (TR-DPO, arXiv 2404.09656). It is then part of a checkpoint. Where an adapter trains, the
reference is the policy's own base model, and costs no memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from learner.config import LearnerConfig
from learner.model.adapters import Adapter
from learner.model.export import unique_tensors
from learner.model.load import directory_of, load_model
from learner.model.packing import MicroBatch, StepTokens
from learner.model.policy import Policy
from protocol.errors import ConfigError
from protocol.weights.base_model import base_digest

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
        if not self.is_due(policy_version):
            return
        policy = unique_tensors(model)
        for name, tensor in unique_tensors(self._model).items():
            tensor.lerp_(policy[name], self._config.ref_model_mixup_alpha)

    def is_due(self, policy_version: int) -> bool:
        """Tell whether it follows the policy after the step that made `policy_version`."""
        return self._config.sync_ref_model and policy_version % self._config.ref_model_sync_steps == 0

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
            self._set(load_file(path))
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} is no reference of this model: {error}") from error

    def _set(self, saved: dict[str, Tensor]) -> None:
        for name, tensor in unique_tensors(self._model).items():
            tensor.copy_(saved[name])


class BaseReference:
    """The policy without its adapter: never moves, and is no part of a checkpoint."""

    checkpoint_bytes = 0
    num_parameters = 0
    """None of its own."""

    def __init__(self, policy: Policy, adapter: Adapter) -> None:
        self._policy, self._adapter = policy, adapter

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step that train."""
        with self._adapter.disabled():
            return self._policy.step_logprobs(step, micro_batches)

    def follow(self, model: PreTrainedModel, policy_version: int) -> None:
        """Stay."""

    def save(self, directory: Path) -> None:
        """Write nothing."""

    def load(self, directory: Path) -> None:
        """Read nothing."""


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


def reference_digest(config: LearnerConfig, checkpoint: Path | None) -> str:
    """Digest the files of the configured model where the reference is read from them; empty where it is not.

    Not of an adapter's base, whose digest the adapter has. Reads all weights, a second or so per GB.

    Raises:
        WeightsError: a file cannot be read.
    """
    saved = config.sync_ref_model and checkpoint is not None and (checkpoint / REFERENCE_FILE).exists()
    if not config.beta or saved:
        return ""
    directory = directory_of(config.model)
    if any(directory.glob("*.safetensors")):
        return base_digest(directory)
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(directory.glob("*.bin")):  # torch's older format
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "blake2b").digest())
    return digest.hexdigest()
