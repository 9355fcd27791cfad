"""One training step: from a batch of groups to gradients, from gradients to weights.

Synchronous and single-threaded: everything here runs on the compute thread, except `write_weights`, which may run
beside `forward_backward` (which changes no parameter). A step is two calls, so that the caller can let the previous
weights be written before `optimizer_step` changes them:

    result = trainer.forward_backward(batch)
    if result.finite:
        policy_version = trainer.optimizer_step()

Keeps the promise that nothing but finite numbers reaches the weights: a loss or gradient that is not finite drops all
gradients of the step. Knows no loop, no socket, no ledger; staleness was checked before (I4).
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.grpo.advantages import group_advantages
from learner.grpo.diagnostics import clip_metrics, policy_kl
from learner.grpo.loss import TokenLoss, grpo_loss, token_weights
from learner.model import export
from learner.model.adapters import Adapter
from learner.model.load import load_model, load_tokenizer, resolve_device
from learner.model.packing import MicroBatch, StepTokens, collect, whole_sequences
from learner.model.policy import Policy
from learner.optimizer import load_state, make_optimizer, save_state, scheduled_rate
from learner.reference import make_reference
from protocol.errors import ConfigError
from protocol.identity import tokenizer_digest
from protocol.messages import Float32, Int32
from protocol.weights.adapters import AdapterSpec
from protocol.weights.manifest import TensorSpec, schema_digest

STATE_FILE = "trainer.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTensors:
    """What the loss needs of a step, [T] each where nothing else is said: every token that trains, in order."""

    targets_T: Tensor
    temperature_T: Tensor
    behavior_logprobs_T: Tensor
    advantages_PG: Tensor
    """[P, G], not flat: for samples/."""
    advantages_T: Tensor
    weights_T: Tensor
    reference_logprobs_T: Tensor | None


@dataclass(slots=True)
class StepRecord:
    """What diagnostics need of a step, gathered row by row (detached)."""

    loss: float = 0.0
    index: list[Tensor] = field(default_factory=list)
    policy_logprobs: list[Tensor] = field(default_factory=list)
    entropy: list[Tensor] = field(default_factory=list)
    ratio: list[Tensor] = field(default_factory=list)
    behavior_weight: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)

    def add(self, index: Tensor, policy_logprobs_T: Tensor, entropy_T: Tensor, loss: TokenLoss) -> None:
        """Take in one row's tokens."""
        self.loss += loss.loss.item()
        self.index.append(index)
        self.policy_logprobs.append(policy_logprobs_T.detach())
        self.entropy.append(entropy_T)
        self.ratio.append(loss.ratio_T.detach())
        if loss.behavior_weight_T is not None:
            self.behavior_weight.append(loss.behavior_weight_T)
        if loss.kl_T is not None:
            self.kl.append(loss.kl_T.detach())


class Trainer:
    """The policy being trained, its optimizer and its reference.

    Args:
        config: the learner's.
        checkpoint: a directory that `save` wrote: weights, optimizer and random state come from there.

    Raises:
        ConfigError: the model, its tokenizer or the checkpoint cannot be loaded.
    """

    def __init__(self, config: LearnerConfig, *, checkpoint: Path | None = None) -> None:
        self._config = config
        self._device = resolve_device(config.device)
        torch.manual_seed(config.seed)
        source = config.model if checkpoint is None or config.use_peft else checkpoint
        self._model = load_model(source, dtype=config.dtype, device=self._device)
        self.tokenizer = load_tokenizer(source)
        self.model_digest = schema_digest(export.specs_of(self._model, config.published_dtype))
        """What the names and shapes of a server's model must hash to."""
        self._adapter = Adapter(self._model, config) if config.use_peft else None
        self._policy = Policy(self._model, share_prefix=config.share_prefix, autocast=config.autocast == "bfloat16")
        self._reference = make_reference(config, self._policy, self._adapter)
        self._parameters = {name: p for name, p in self._model.named_parameters() if p.requires_grad}
        self._optimizer = make_optimizer(self._parameters, config)
        self._gradient_norm: Tensor | None = None
        self.policy_version = 0
        if checkpoint is not None:
            self._resume(checkpoint)

    @property
    def vocab_size(self) -> int:
        """Rows of the output head: every token id is below it."""
        return int(self._model.get_output_embeddings().weight.shape[0])

    @property
    def eos_token_ids(self) -> list[int]:
        """What ends a completion by the model's own generation config, else by its tokenizer; may be empty."""
        eos = self._model.generation_config.eos_token_id if self._model.generation_config else None
        eos = self.tokenizer.eos_token_id if eos is None else eos
        return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)

    @property
    def tokenizer_digest(self) -> str:
        """What a server's tokenizer must hash to."""
        return tokenizer_digest(self.tokenizer.get_vocab())

    @property
    def learning_rate(self) -> float:
        """Of the next `optimizer_step`."""
        return scheduled_rate(self._config, self.policy_version)

    def forward_backward(self, batch: Batch) -> StepResult:
        """Compute the gradients of the batch's loss; the weights stay as they are.

        Micro-batches only bound the memory: all share the step's denominators, so their number never changes the
        result beyond rounding. The same batch and weights give the same bits (CPU).

        Returns:
            The step's metrics, or why it must be skipped; then no gradient is left.
        """
        self._drop_gradients()
        step = collect(batch.groups, mask_truncated_completions=self._config.mask_truncated_completions)
        if not step.completion_T.size:
            return StepResult(finite=False, reason="no completion of the batch trains")
        micro_batches = self._policy.pack(step, self._config.token_budget)
        tensors = self._prepare(step, micro_batches)
        record = StepRecord()
        for micro_batch in micro_batches:
            self._accumulate(micro_batch, tensors, record)
            if not math.isfinite(record.loss):
                self._drop_gradients()
                return StepResult(finite=False, reason=f"loss is {record.loss}", loss_tokens=step.completion_T.size)
        norm = torch.nn.utils.get_total_norm([p.grad for p in self._parameters.values() if p.grad is not None])
        if not torch.isfinite(norm):
            self._drop_gradients()
            reason = f"gradient norm is {norm.item()}"
            return StepResult(finite=False, reason=reason, loss_tokens=step.completion_T.size)
        self._gradient_norm = norm
        metrics = self._metrics(record, tensors) | {
            "grad_norm": norm.item(),
            "num_micro_batches": float(len(micro_batches)),
            "tokens_forwarded": float(sum(micro_batch.num_tokens for micro_batch in micro_batches)),
            "completion_tokens": float(step.lengths_N.sum()),
        }
        advantages = tuple(map(tuple, tensors.advantages_PG.tolist()))
        return StepResult(finite=True, loss_tokens=step.completion_T.size, metrics=metrics, advantages=advantages)

    def optimizer_step(self) -> int:
        """Clip the gradients to max_grad_norm, update the weights, and return the new policy_version."""
        assert self._gradient_norm is not None, "optimizer_step follows a finite forward_backward"
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._config.max_grad_norm, self._gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._drop_gradients()
        self.policy_version += 1
        return self.policy_version

    def canary_logprobs(self, tokens: Int32) -> Float32:
        """Compute the logprobs of tokens[:, 1:] at temperature 1, without gradient.

        By the weights that train, under the run's autocast. Published ones may be rounded to another dtype: a copy of
        the whole model in it would cost more than the difference is worth (it is the engine's rounding, too).

        Args:
            tokens: [N, L], L >= 2.

        Returns:
            [N, L - 1]
        """
        step = whole_sequences(tokens)
        logprobs_T = self._policy.step_logprobs(step, self._policy.pack(step, self._config.token_budget))
        return logprobs_T.float().cpu().numpy().reshape(len(tokens), -1)

    @property
    def adapter(self) -> AdapterSpec | None:
        """What a published version is beside its tensors, where only an adapter trains and is published."""
        return self._adapter.spec if self._adapter is not None else None

    def specs(self) -> list[TensorSpec]:
        """Describe the tensors of a published version."""
        return export.describe(self._published, self._config.published_dtype)

    def write_weights(self, mapped: export.WritableWeights) -> None:
        """Write the weights as they are, in the published dtype. May run beside `forward_backward`.

        Raises:
            WeightsError: a tensor is not finite.
        """
        export.write_tensors(self._published, self._config.published_dtype, mapped)

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes, about: what trains and AdamW's two moments of each."""
        sizes: list[int] = [p.numel() * p.element_size() for p in self._parameters.values()]
        return 3 * sum(sizes)

    def save(self, directory: Path) -> None:
        """Write a plain directory of Hugging Face (an adapter: of peft), and beside it what `checkpoint` needs."""
        directory.mkdir(parents=True, exist_ok=True)
        if self._adapter is not None:
            self._adapter.save(directory)
            self.tokenizer.save_pretrained(directory)
        else:
            export.save_pretrained(self._model, self.tokenizer, directory)
        save_state(self._optimizer, self._parameters, directory)
        state = {
            "policy_version": self.policy_version,
            "torch_rng_state": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        }
        (directory / STATE_FILE).write_text(json.dumps(state))

    @property
    def _published(self) -> Mapping[str, Tensor]:
        return self._adapter.tensors if self._adapter is not None else export.unique_tensors(self._model)

    def _resume(self, checkpoint: Path) -> None:
        if self._adapter is not None:
            self._adapter.load(checkpoint)
        load_state(self._optimizer, self._parameters, checkpoint)
        try:
            state = json.loads((checkpoint / STATE_FILE).read_text())
            self.policy_version = int(state["policy_version"])
            random_state = bytearray(base64.b64decode(state["torch_rng_state"], validate=True))
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"checkpoint {checkpoint} has no usable {STATE_FILE}: {error}") from error
        torch.set_rng_state(torch.frombuffer(random_state, dtype=torch.uint8))

    def _prepare(self, step: StepTokens, micro_batches: list[MicroBatch]) -> StepTensors:
        """Compute everything that the loss needs and that does not depend on the weights being trained."""
        trains_PG = torch.from_numpy(step.trains_PG)
        advantages_PG = group_advantages(
            torch.from_numpy(step.rewards_PG), trains_PG, scale_rewards=self._config.scale_rewards
        )
        completion_T = torch.from_numpy(step.completion_T)
        weights_T = token_weights(self._config.loss_type, completion_T, torch.from_numpy(step.group_N))
        reference = self._reference
        return StepTensors(
            targets_T=torch.from_numpy(step.targets_T).to(self._device),
            temperature_T=torch.from_numpy(step.temperature_T).to(self._device),
            behavior_logprobs_T=torch.from_numpy(step.behavior_logprobs_T).to(self._device),
            advantages_PG=advantages_PG,
            advantages_T=advantages_PG[trains_PG][completion_T].to(self._device),
            weights_T=weights_T.to(self._device),
            reference_logprobs_T=None if reference is None else reference.logprobs(step, micro_batches),
        )

    def _accumulate(self, micro_batch: MicroBatch, tensors: StepTensors, record: StepRecord) -> None:
        """Add the gradients of a micro-batch to those that are there."""
        prompt = self._policy.forward_prompt(micro_batch)
        for rows in micro_batch.rows:
            index = torch.from_numpy(rows.index_T).to(self._device)
            policy_logprobs_T, entropy_T = self._policy.logprobs(
                rows, tensors.targets_T[index], tensors.temperature_T[index], prompt
            )
            loss = self._loss(policy_logprobs_T, index, tensors)
            loss.loss.backward()
            record.add(index, policy_logprobs_T, entropy_T, loss)
        if prompt is not None:
            prompt.backward()

    def _loss(self, policy_logprobs_T: Tensor, index: Tensor, tensors: StepTensors) -> TokenLoss:
        config = self._config
        # One update per step: the policy at its start is the policy, and needs no forward pass of its own.
        proximal = policy_logprobs_T.detach() if config.anchor == "proximal" else None
        truncate = config.importance_sampling_mode == "token_truncate"
        reference = tensors.reference_logprobs_T
        return grpo_loss(
            policy_logprobs_T,
            tensors.behavior_logprobs_T[index],
            tensors.advantages_T[index],
            tensors.weights_T[index],
            epsilon=config.epsilon,
            epsilon_high=config.clip_high,
            proximal_logprobs_T=proximal,
            importance_sampling_clip_max=config.importance_sampling_clip_max if truncate else None,
            reference_logprobs_T=None if reference is None else reference[index],
            beta=config.beta,
        )

    def _metrics(self, record: StepRecord, tensors: StepTensors) -> dict[str, float]:
        index = torch.cat(record.index)
        metrics = {"loss": record.loss, "entropy": torch.cat(record.entropy).mean().item()}
        metrics |= clip_metrics(
            torch.cat(record.ratio),
            tensors.advantages_T[index],
            epsilon=self._config.epsilon,
            epsilon_high=self._config.clip_high,
        )
        metrics["policy_kl"] = policy_kl(torch.cat(record.policy_logprobs), tensors.behavior_logprobs_T[index])
        if record.kl:
            metrics["kl"] = torch.cat(record.kl).mean().item()
        if record.behavior_weight:
            metrics["importance_weight/mean"] = torch.cat(record.behavior_weight).mean().item()
        return metrics

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._gradient_norm = None
