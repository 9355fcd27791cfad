"""One training step: from a batch of groups to gradients, from gradients to weights.

Synchronous and single-threaded: everything here runs on the compute thread, except `write_weights`, which may run
beside `forward_backward` (which changes no parameter). A step is two calls, so that the caller can let the previous
weights be written before `optimizer_step` changes them:

    result = trainer.forward_backward(batch)
    if result.finite:
        policy_version = trainer.optimizer_step()

A step may make several optimizer updates: `optimizer_step` then makes them all, and one policy_version comes of them.

Keeps the promise that nothing but finite numbers reaches the weights: a loss or gradient that is not finite drops all
gradients of its update. What is optimized is objective.py's business. Knows no loop, no socket, no ledger; staleness
was checked before (I4).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from learner.backward import accumulate
from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.critic import Critic
from learner.journal_records import Numerics
from learner.model import export, flex, offloading
from learner.model.adapters import Adapter
from learner.model.checkpointing import checkpoint_layers
from learner.model.load import load_model, load_tokenizer, resolve_device
from learner.model.packing import MicroBatch, StepTokens, collect, mini_batches, whole_sequences
from learner.model.policy import Policy
from learner.objective import Objective, StepTensors, UpdateRecord
from learner.optimizer import (
    NotFinite,
    check_library,
    finite_gradient_norm,
    load_state,
    make_optimizer,
    save_state,
    scheduled_rate,
    total_norm,
)
from learner.optimizer_shards import has_shards, load_shards
from learner.reference import make_reference
from learner.trainer_state import load_progress, numerics, save_progress
from protocol.identity import tokenizer_digest
from protocol.logs import event
from protocol.messages import Float32, Int32
from protocol.weights.adapters import AdapterSpec
from protocol.weights.manifest import Algorithm, TensorSpec, schema_digest

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one optimizer update trains."""

    micro_batches: list[MicroBatch]
    tensors: StepTensors


class Trainer:
    """The policy being trained, its optimizer, its reference and (PPO) its critic.

    Args:
        config: the learner's.
        checkpoint: a directory that `save` wrote: weights, optimizer and random state come from there.

    Raises:
        ConfigError: the model, its tokenizer or the checkpoint cannot be loaded.
    """

    def __init__(self, config: LearnerConfig, *, checkpoint: Path | None = None) -> None:
        self._config = config
        check_library(config.optim)
        self._device = resolve_device(config.device)
        if config.attn_implementation == "flex_attention":
            flex.check_device(self._device)
        if config.activation_offloading:
            offloading.check_device(self._device)
        self._objective = Objective(config, self._device)
        torch.manual_seed(config.seed)
        source = config.model if checkpoint is None or config.use_peft else checkpoint
        self._model = load_model(source, dtype=config.dtype, device=self._device)
        if config.gradient_checkpointing:
            checkpoint_layers(self._model)
        self.tokenizer = load_tokenizer(source)
        self.model_digest = schema_digest(export.specs_of(self._model, config.published_dtype))
        """What the names and shapes of a server's model must hash to."""
        self._adapter = Adapter(self._model, config) if config.use_peft else None
        self._policy = Policy(
            self._model,
            share_prefix=config.share_prefix,
            autocast=config.autocast == "bfloat16",
            fp32_head=config.cast_lm_head_to_fp32,
            flex_attention=config.attn_implementation == "flex_attention",
            activation_offloading=config.activation_offloading,
        )
        self._reference = make_reference(config, self._policy, self._adapter)
        self._critic = (
            Critic(config, device=self._device, share_prefix=self._policy.shares_prefix, checkpoint=checkpoint)
            if config.has_critic
            else None
        )
        self._parameters = self._place_parameters()
        self._optimizer = make_optimizer(self._parameters, config)
        self._gradient_norm: Tensor | None = None
        self._fused_head = config.loss_head != "recompute" and config.token_level
        self._updates: list[Update] = []
        """Of the step under way, whose gradients are still to be computed."""
        self._metrics: list[dict[str, float]] = []
        """Of the step's updates so far."""
        self._num_completions = 0
        self.policy_version = 0
        self.peak_learning_rate = config.learning_rate
        """A live knob."""
        self.fixed_learning_rate: float | None = None
        """Of the next step, whatever schedule and knob say: in a replay, and where another rank has decided."""
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
        if self.fixed_learning_rate is not None:
            return self.fixed_learning_rate
        return scheduled_rate(self._config, self.policy_version, peak=self.peak_learning_rate)

    @property
    def numerics(self) -> Numerics:
        """What its bits hang on, beside the configuration."""
        return numerics(self._device)

    @property
    def num_parameters(self) -> dict[str, int]:
        """Of every model held, by what it is: policy, critic, reference."""
        models = {"critic": self._critic, "reference": self._reference}
        others = {name: model.num_parameters for name, model in models.items() if model is not None}
        return {"policy": sum(p.numel() for p in self._parameters.values()), **others}

    def forward_backward(self, batch: Batch) -> StepResult:
        """Compute the gradients of the batch's loss (of its first update's); the weights stay as they are.

        Micro-batches only bound the memory: all share the update's denominators, so their number never changes the
        result beyond rounding. The same batch and weights give the same bits (CPU).

        Returns:
            The step's metrics, or why it must be skipped; then no gradient is left.
        """
        self._drop_gradients()
        step = collect(
            batch.groups,
            mask_truncated_completions=self._config.mask_truncated_completions,
            min_scored=self._config.min_scored,
        )
        loss_tokens = step.completion_T.size
        if not loss_tokens:
            return StepResult(finite=False, reason="no completion of the batch trains")
        first, *self._updates = updates = self._plan(step)
        try:
            self._metrics = [self._gradients(first)]
        except NotFinite as error:
            self._drop_gradients()
            return StepResult(finite=False, reason=str(error), loss_tokens=loss_tokens)
        self._num_completions = step.lengths_N.size
        micro_batches = [micro_batch for update in updates for micro_batch in update.micro_batches]
        num_micro_batches, tokens_forwarded = self._totals(len(micro_batches), sum(m.num_tokens for m in micro_batches))
        self._metrics[0] |= {
            "num_micro_batches": float(num_micro_batches),
            "tokens_forwarded": float(tokens_forwarded),
            "completion_tokens": float(step.lengths_N.sum()),
        }
        advantages = tuple(map(tuple, first.tensors.advantages_PG.tolist()))
        return StepResult(finite=True, loss_tokens=loss_tokens, metrics=self.step_metrics, advantages=advantages)

    def optimizer_step(self) -> int:
        """Make the step's updates and return the new policy_version.

        The first one's gradients are there; where a step has several (num_iterations, num_mini_batches), the others'
        are computed here, each after the update before it. One that is not finite is left out.
        """
        self._apply()
        for update in self._updates:
            try:
                self._metrics.append(self._gradients(update))
            except NotFinite as error:
                self._drop_gradients()
                event(log, "update_left_out", level=logging.WARNING, step=self.policy_version + 1, reason=str(error))
            else:
                self._apply()
        self._updates = []
        self.policy_version += 1
        if self._reference is not None:
            self._reference.follow(self._model, self.policy_version)
            self._objective.adapt(self.step_metrics["kl"], self._num_completions)
        return self.policy_version

    @property
    def step_metrics(self) -> dict[str, float]:
        """Of the step's updates so far: means (maxima of `/max`), and where there are several how many were made."""
        values: dict[str, list[float]] = {}
        for metrics in self._metrics:
            for key, value in metrics.items():
                values.setdefault(key, []).append(value)
        counts = {"num_updates": float(len(self._metrics))} if self._config.updates_per_step > 1 else {}
        return {key: (max if key.endswith("/max") else fmean)(of) for key, of in values.items()} | counts

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

    def write_weights(self, mapped: export.WritableWeights, algorithm: Algorithm | None = None) -> dict[str, list[str]]:
        """Write the weights as they are, in the published dtype; see `export.write_tensors`.

        Raises:
            WeightsError: a tensor is not finite.
        """
        return export.write_tensors(self._published, self._config.published_dtype, mapped, algorithm)

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes at most: what trains with AdamW's moments, a reference that follows, a critic."""
        sizes: list[int] = [p.numel() * p.element_size() for p in self._parameters.values()]
        others = [model.checkpoint_bytes for model in (self._reference, self._critic) if model is not None]
        return 3 * sum(sizes) + sum(others)

    def save(self, directory: Path) -> None:
        """Write a plain directory of Hugging Face (an adapter: of peft), and beside it what `checkpoint` needs."""
        directory.mkdir(parents=True, exist_ok=True)
        if self._adapter is not None:
            self._adapter.save(directory)
            self.tokenizer.save_pretrained(directory)
        else:
            export.save_pretrained(self._model, self.tokenizer, directory)
        save_state(self._optimizer, self._parameters, directory)
        self._save_progress(directory)
        for model in (self._reference, self._critic):
            if model is not None:
                model.save(directory)

    # What several ranks do otherwise: learner/ranks/trainer.py.

    def _place_parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the parameters to optimize, by name."""
        return {name: p for name, p in self._model.named_parameters() if p.requires_grad}

    def _pack(self, step: StepTokens) -> list[MicroBatch]:
        """Lay out what is to be forwarded here."""
        return self._policy.pack(step, self._config.token_budget)

    def _whole(self, logprobs_T: Tensor) -> Tensor:
        """Complete logprobs that were computed of the tokens forwarded here, [T]."""
        return logprobs_T

    def _totals(self, *counts: int) -> list[int]:
        """Add up what was counted."""
        return list(counts)

    def _combine(self, record: UpdateRecord, num_tokens: int) -> None:
        """Complete gradients and record, once all micro-batches are done."""

    def _total_norm(self) -> Tensor:
        """Compute the norm of all gradients, []."""
        return total_norm(self._parameters.values())

    def _load_optimizer(self, checkpoint: Path) -> None:
        """Read the optimizer's state, saved by however many ranks."""
        if has_shards(checkpoint):
            load_shards(self._optimizer, self._parameters, checkpoint)
        else:
            load_state(self._optimizer, self._parameters, checkpoint)

    def _save_progress(self, directory: Path) -> None:
        save_progress(directory, self._config, policy_version=self.policy_version, beta=self._objective.beta)

    @property
    def _published(self) -> Mapping[str, Tensor]:
        return self._adapter.tensors if self._adapter is not None else export.unique_tensors(self._model)

    def _resume(self, checkpoint: Path) -> None:
        if self._adapter is not None:
            self._adapter.load(checkpoint)
        self._load_optimizer(checkpoint)
        self.policy_version, self._objective.beta = load_progress(checkpoint, self._config)
        if self._reference is not None:
            self._reference.load(checkpoint)

    def _plan(self, step: StepTokens) -> list[Update]:
        """Cut the step into its updates, with everything that does not depend on the weights being trained."""
        config, objective, reference = self._config, self._objective, self._reference
        parts = mini_batches(step, config.num_mini_batches)
        packed = [self._pack(part) for part in parts]

        def forward(model: Callable[[StepTokens, list[MicroBatch]], Tensor]) -> Tensor:
            return torch.cat([model(part, micro_batches) for part, micro_batches in zip(parts, packed, strict=True)])

        tensors = objective.prepare(
            step,
            parts,
            policy_version=self.policy_version,
            proximal_logprobs_T=self._whole(forward(self._policy.step_logprobs)) if config.needs_proximal else None,
            reference_logprobs_T=None if reference is None else forward(reference.logprobs),
            values_T=None if self._critic is None else forward(self._critic.values),
        )
        updates = list(zip(packed, tensors, strict=True)) * config.num_iterations
        return [
            Update(micro_batches=micro_batches, tensors=replace(tensors, progress=done / len(updates)))
            for done, (micro_batches, tensors) in enumerate(updates)
        ]

    def _gradients(self, update: Update) -> dict[str, float]:
        """Compute the gradients of an update, and its metrics.

        Raises:
            NotFinite: a loss or gradient is not. Gradients are left.
        """
        record = UpdateRecord()
        for micro_batch in update.micro_batches:
            accumulate(self._policy, self._objective, micro_batch, update.tensors, record, fused_head=self._fused_head)
        self._combine(record, update.tensors.weights_T.numel())
        self._gradient_norm = finite_gradient_norm(self._total_norm(), "loss", record.loss)
        metrics = self._objective.metrics(record, update.tensors) | {"grad_norm": self._gradient_norm.item()}
        if self._critic is not None:
            metrics |= self._critic.forward_backward(update.micro_batches, update.tensors)
        return metrics

    def _apply(self) -> None:
        """Clip the gradients to max_grad_norm and update the weights."""
        assert self._gradient_norm is not None, "optimizer_step follows a finite forward_backward"
        torch.nn.utils.clip_grads_with_norm_(self._parameters.values(), self._config.max_grad_norm, self._gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        if self._critic is not None:
            peak = self._config.value_learning_rate or self._config.learning_rate
            self._critic.apply(peak * self.learning_rate / self._config.learning_rate)
        self._drop_gradients()

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        if self._critic is not None:
            self._critic.drop_gradients()
        self._gradient_norm = None
