"""The trainer as one of several ranks: its share of a step's completions, its shard of weights and optimizer.

What is the same on all ranks is computed by each: advantages, denominators, which rank trains what. Summed over them
are the gradients and what the metrics are made of. A step's collectives do not depend on how many micro-batches a rank
has; those of a rank with none are the same. Only context parallelism has collectives within rows (model/context.py),
and gives the ranks of one context the same number of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from learner.batch import Batch, StepResult
from learner.config import LearnerConfig
from learner.model import export
from learner.model.context import Context, check_context, cut
from learner.model.packing import MicroBatch, StepTokens
from learner.model.parallel import ShardedModel, local, token_cost, weights_digest, whole
from learner.model.shares import divide, of_whole_step, restrict
from learner.objective import UpdateRecord
from learner.optimizer_shards import load_shards, save_shards
from learner.ranks.commands import Save, Start, Update, to_bytes, train_command
from learner.ranks.world import World
from learner.reference import REFERENCE_FILE, Reference
from learner.trainer import Trainer

PER_TOKEN = ("policy_logprobs", "entropy", "ratio", "behavior_weight", "kl")
"""Of an UpdateRecord."""


class RankTrainer(Trainer):
    """What every rank runs. Each method is called on all of them, in the same order.

    But for `canary_logprobs` and `write_weights`: each rank has the gathered weights, and rank 0 needs nobody for them.
    """

    def __init__(self, config: LearnerConfig, world: World, *, checkpoint: Path | None = None) -> None:
        self._world = world
        super().__init__(config, checkpoint=checkpoint)

    def save(self, directory: Path) -> None:
        """Write the weights parameter by parameter (rank 0), each rank's shard of the optimizer, and the rest."""
        tensors = ((name, whole(parameter.detach())) for name, parameter in self._parameters.items())
        if self._world.place.leads:
            directory.mkdir(parents=True, exist_ok=True)
            export.save_gathered(self._model, self.tokenizer, self._config.dtype, tensors, directory)
            self._save_progress(directory)
        else:
            for _ in tensors:  # rank 0 asks for each
                pass
        save_shards(self._optimizer, self._parameters, directory)
        if self._reference is not None:
            self._reference.save(directory)

    def _place_parameters(self) -> dict[str, torch.nn.Parameter]:
        layout = "shared prefixes" if self._policy.shares_prefix else "padded rows"
        statement = {"model": weights_digest(self._model), "layout of rows": layout}
        if isinstance(self._reference, Reference):
            statement["reference model"] = weights_digest(self._reference._model)
        self._world.agree(statement)
        self._cost = token_cost(self._model)
        size = self._config.context_parallel_size
        if size > 1:
            check_context(self._model, size, shares_prefix=self._policy.shares_prefix)
            self._policy.context = self._world.context(size)
        autocast = self._config.autocast == "bfloat16"
        self._sharded = ShardedModel(self._policy, self._world.mesh(), autocast=autocast)
        if isinstance(self._reference, Reference):
            self._reference = RankReference(
                self._reference, self._world, self._sharded.parameters, self._policy.context, autocast=autocast
            )
        return self._sharded.parameters

    def _pack(self, step: StepTokens) -> list[MicroBatch]:
        place, size = self._world.place, self._config.context_parallel_size
        part, index_T = restrict(step, divide(step, self._cost, place.world_size // size) == place.rank // size)
        packed = self._policy.pack(part, self._config.token_budget * size)
        micro_batches = [of_whole_step(micro_batch, index_T) for micro_batch in packed]
        if size == 1:
            return micro_batches
        completion_T = None if self._config.token_level else step.completion_T
        return [cut(micro_batch, place.rank % size, size, completion_T) for micro_batch in micro_batches]

    def _whole(self, logprobs_T: Tensor) -> Tensor:
        return self._world.sum(logprobs_T)

    def _totals(self, *counts: int) -> list[int]:
        totals: list[int] = self._world.sum(torch.tensor(counts)).tolist()
        return totals

    def _combine(self, record: UpdateRecord, num_tokens: int) -> None:
        """Sum the gradients, and make the record that of all tokens: every rank has the metrics of the whole step."""
        self._sharded.reduce_gradients()
        numbers = [record.loss, *(float(bool(getattr(record, name))) for name in PER_TOKEN)]
        record.loss, *filled = self._world.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()
        names = [name for name, count in zip(PER_TOKEN, filled, strict=True) if count]
        values_FT = torch.zeros(len(names), num_tokens, device=self._device)
        if record.index:
            index = torch.cat(record.index)
            for values_T, name in zip(values_FT, names, strict=True):
                values_T[index] = torch.cat(getattr(record, name)).float()
        for values_T, name in zip(self._world.sum(values_FT), names, strict=True):
            setattr(record, name, [values_T])
        record.index = [torch.arange(num_tokens, device=self._device)]

    def _apply(self) -> None:
        """Update the shards, then gather the new weights."""
        super()._apply()
        self._sharded.gather()

    def _total_norm(self) -> Tensor:
        return whole(super()._total_norm())

    def _load_optimizer(self, checkpoint: Path) -> None:
        load_shards(self._optimizer, self._parameters, checkpoint)


class RankReference(Reference):
    """The reference in shards: gathered only while it runs, when the step has no gradients yet."""

    def __init__(
        self,
        reference: Reference,
        world: World,
        policy: dict[str, torch.nn.Parameter],
        context: Context | None,
        *,
        autocast: bool,
    ) -> None:
        self._config = reference._config
        self._policy = reference._policy
        self._policy.context = context
        self._world = world
        self._followed = policy
        self._sharded = ShardedModel(self._policy, world.mesh(), autocast=autocast)
        self._sharded.release()

    def logprobs(self, step: StepTokens, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Compute reference_logprobs [T] of all tokens of the step, each on the rank that trains it."""
        self._sharded.gather()
        logprobs_T = super().logprobs(step, micro_batches)
        self._sharded.release()
        return self._world.sum(logprobs_T)

    def follow(self, model: PreTrainedModel, policy_version: int) -> None:
        """As on one rank, shard by shard."""
        if self.is_due(policy_version):
            for name, parameter in self._sharded.parameters.items():
                policy = local(self._followed[name].detach())
                local(parameter.detach()).lerp_(policy, self._config.ref_model_mixup_alpha)

    @property
    def checkpoint_bytes(self) -> int:
        """What `save` writes, about."""
        sizes: list[int] = [p.numel() * p.element_size() for p in self._sharded.parameters.values()]
        return sum(sizes) if self._config.sync_ref_model else 0

    def save(self, directory: Path) -> None:
        """Write the weights, parameter by parameter (rank 0)."""
        if not self._config.sync_ref_model:
            return
        specs = export.describe(self._sharded.parameters, self._config.dtype)
        tensors = ((name, whole(parameter.detach())) for name, parameter in self._sharded.parameters.items())
        if self._world.place.leads:
            export.write_file(directory / REFERENCE_FILE, specs, tensors)
        else:
            for _ in tensors:
                pass

    def _set(self, saved: dict[str, Tensor]) -> None:
        for name, parameter in self._sharded.parameters.items():
            assert isinstance(parameter, DTensor)
            shard = distribute_tensor(saved[name].to(self._world.device), parameter.device_mesh, parameter.placements)
            local(parameter.detach()).copy_(local(shard))


class LeadingTrainer(RankTrainer):
    """Rank 0's: has the others do what it does.

    Raises:
        RankLost: in every method: a rank is gone.
    """

    def __init__(self, config: LearnerConfig, world: World, *, logs_dir: Path, checkpoint: Path | None = None) -> None:
        with world.watched("loading"):
            world.broadcast(to_bytes(Start(str(checkpoint) if checkpoint else None, str(logs_dir))))
            super().__init__(config, world, checkpoint=checkpoint)

    def forward_backward(self, batch: Batch) -> StepResult:
        """As on one rank."""
        with self._world.watched("forward_backward"):
            self._world.broadcast(train_command(batch))
            return super().forward_backward(batch)

    def optimizer_step(self) -> int:
        """As on one rank."""
        with self._world.watched("optimizer_step"):
            self._world.broadcast(to_bytes(Update(self.learning_rate)))
            return super().optimizer_step()

    def save(self, directory: Path) -> None:
        """As on one rank; the directory must be on a file system that every rank sees."""
        with self._world.watched("save"):
            directory.mkdir(parents=True, exist_ok=True)
            self._world.broadcast(to_bytes(Save(str(directory))))
            super().save(directory)
