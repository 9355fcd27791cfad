"""The critic of PPO: a second model, of the size of the policy, that says what reward each state can expect.

It begins as a copy of the configured model with a value head, one number per hidden state, in place of the output head;
it has an AdamW of its own and is part of a checkpoint. It exists only with advantage_estimator "gae", and runs the very
rows that the policy runs: V(s_t) is read at the position before token t. It is never published.

GRPO (DeepSeekMath, arXiv 2402.03300) is PPO without all of this file: weights, gradients and moments of a second model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from learner.config import LearnerConfig
from learner.grpo.values import clipped_value_loss, explained_variance
from learner.model.checkpointing import checkpoint_layers
from learner.model.export import unique_tensors
from learner.model.load import DTYPES, head_of, load_model
from learner.model.packing import MicroBatch, Rows, StepTokens
from learner.model.policy import ForwardedPrompt, Policy
from learner.objective import StepTensors
from learner.optimizer import finite_gradient_norm, load_state, make_optimizer, save_state, total_norm
from protocol.errors import ConfigError

DIRECTORY = "critic"
"""Of a checkpoint; with weights and, under its usual name, the optimizer's state."""
WEIGHTS_FILE = "critic.safetensors"


def beginning(checkpoint: Path | None) -> str:
    """Say that a run which has trained without a critic gets one now; empty where it had one, or has only begun."""
    if checkpoint is None or (checkpoint / DIRECTORY).exists():
        return ""
    return (
        f"advantage_estimator gae: {checkpoint.name} has no critic, so a new one begins, as a copy of the policy that"
        " expects a reward of 0 everywhere: it has to learn before its advantages are better than the rewards alone"
    )


class Critic:
    """Single-threaded: the compute thread's.

    Args:
        config: the learner's.
        device: of the policy.
        share_prefix: whether the policy shares prompts; both must run the same rows.
        checkpoint: a directory that `save` wrote into; one that had no critic yet starts a new one of its policy.

    Raises:
        ConfigError: the model or the checkpoint cannot be loaded.
    """

    def __init__(
        self, config: LearnerConfig, *, device: torch.device, share_prefix: bool, checkpoint: Path | None
    ) -> None:
        self._config = config
        self._model = load_model(checkpoint or config.model, dtype=config.dtype, device=device)
        if config.gradient_checkpointing:
            checkpoint_layers(self._model)
        self._policy = Policy(
            self._model,
            share_prefix=share_prefix,
            autocast=config.autocast == "bfloat16",
            flex_attention=config.attn_implementation == "flex_attention",
            activation_offloading=config.activation_offloading,
        )
        value_head = torch.nn.Linear(self._model.get_output_embeddings().in_features, 1, dtype=DTYPES[config.dtype])
        torch.nn.init.zeros_(value_head.weight)  # the first advantages are the rewards, not noise
        torch.nn.init.zeros_(value_head.bias)
        self._model.set_output_embeddings(value_head.to(device))
        self._parameters = dict(self._model.named_parameters())
        self._optimizer = make_optimizer(self._parameters, config)
        if checkpoint is not None and (checkpoint / DIRECTORY).exists():
            self._load(checkpoint / DIRECTORY)

    @property
    def num_parameters(self) -> int:
        """All of them train."""
        return sum(p.numel() for p in self._parameters.values())

    def values(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute V(s_t) for all tokens of the step that train, [T] float32, without gradient."""
        values_T = torch.empty(step.completion_T.size, device=self._policy.device)
        with torch.no_grad():
            for micro_batch in micro_batches:
                prompt = self._policy.forward_prompt(micro_batch)
                for rows in micro_batch.rows:
                    values_T[torch.from_numpy(rows.index_T).to(values_T.device)] = self._values(rows, prompt)
        return values_T

    def forward_backward(self, micro_batches: Sequence[MicroBatch], tensors: StepTensors) -> dict[str, float]:
        """Compute the gradients of an update's value loss; the weights stay as they are.

        Args:
            micro_batches: the update's, as the policy runs them.
            tensors: the update's.

        Raises:
            NotFinite: a loss or gradient is not. Gradients are left.
        """
        assert tensors.values_T is not None, "a critic has judged the step"
        assert tensors.returns_T is not None, "a critic has judged the step"
        total_loss, num_clipped = 0.0, 0
        for micro_batch in micro_batches:
            prompt = self._policy.forward_prompt(micro_batch)
            for rows in micro_batch.rows:
                index = torch.from_numpy(rows.index_T).to(self._policy.device)
                loss, clipped_T = clipped_value_loss(
                    self._values(rows, prompt),
                    tensors.values_T[index],
                    tensors.returns_T[index],
                    tensors.weights_T[index],
                    cliprange_value=self._config.cliprange_value,
                )
                loss.backward()
                total_loss += loss.item()
                num_clipped += int(clipped_T.sum())
            if prompt is not None:
                prompt.backward()
        self._gradient_norm = finite_gradient_norm(total_norm(self._parameters.values()), "value loss", total_loss)
        return {
            "value_loss": total_loss,
            "value_grad_norm": self._gradient_norm.item(),
            "value_clip_ratio": num_clipped / tensors.values_T.numel(),
            "value/mean": tensors.values_T.mean().item(),
            "value/explained_variance": explained_variance(tensors.values_T, tensors.returns_T),
        }

    def apply(self, learning_rate: float) -> None:
        """Clip the gradients to max_grad_norm and update the weights."""
        parameters = self._parameters.values()
        torch.nn.utils.clip_grads_with_norm_(parameters, self._config.max_grad_norm, self._gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget the gradients of an update."""
        self._optimizer.zero_grad(set_to_none=True)

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes at most: the weights, and AdamW's two moments of each."""
        sizes: list[int] = [p.numel() * p.element_size() for p in self._parameters.values()]
        return 3 * sum(sizes)

    def save(self, directory: Path) -> None:
        """Write weights and optimizer into a directory of their own in `directory`."""
        directory = directory / DIRECTORY
        directory.mkdir(exist_ok=True)
        save_file(unique_tensors(self._model), directory / WEIGHTS_FILE)
        save_state(self._optimizer, self._parameters, directory)

    def _load(self, directory: Path) -> None:
        path = directory / WEIGHTS_FILE
        try:
            saved = load_file(path)
            for name, tensor in unique_tensors(self._model).items():
                tensor.copy_(saved[name])
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            raise ConfigError(f"{path} is no critic of this model: {error}") from error
        load_state(self._optimizer, self._parameters, directory)

    def _values(self, rows: Rows, prompt: ForwardedPrompt | None) -> Tensor:
        """V before each token of `rows` that trains, [T] float32; the head is in float32 whatever the model's dtype."""
        hidden_TH = self._policy.predictors(rows, prompt).float()
        weight_1H, bias_1 = head_of(self._model)
        assert bias_1 is not None, "made in __init__"
        return torch.nn.functional.linear(hidden_TH, weight_1H.float(), bias_1.float())[:, 0]
