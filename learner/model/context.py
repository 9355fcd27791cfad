"""Context parallelism: a row's tokens divided among ranks, for sequences whose activations one device cannot hold.

    cut        rank c of C gets the c-th part of the row's tokens, and of the predictions that train
    layers     each token for itself, on its rank, as ever
    attention  all-to-all: every token of H / C heads; attended as on one rank; all-to-all back to own tokens, all heads
    behind     last hidden states are gathered, for tokens are predicted from others' (gradients: summed, each its own)

(DeepSpeed-Ulysses, arXiv 2309.14509; accelerate's sp_size, verl's ulysses_sequence_parallel_size.) Whoever attends sees
whole rows and whole prompts, so layouts, cascades and kernels are those of one rank. The ranks of one context run the
same rows in the same order, forward and backward: so their collectives meet. Parameters' gradients are those of own
tokens and own predictions, to be summed over all ranks like any others.

Shapes: T tokens of a row, L = ceil(T / C) of them here, H heads (query or key), D head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional
from transformers import PreTrainedModel

from learner.model.packing import Int64, MicroBatch, Rows
from protocol.errors import ConfigError

POSITION_DEPENDENT = {"dynamic", "longrope"}
"""Types of rotary positions, by transformers' words."""
# torch has renamed both, and warns of the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def cut(micro_batch: MicroBatch, part: int, num_parts: int, completion_T: Int64 | None) -> MicroBatch:
    """Keep one rank's part of a micro-batch's rows.

    Args:
        micro_batch: of shared-prefix rows.
        part: which.
        num_parts: of how many.
        completion_T: [T] of the step's tokens that train, where those of a completion must be predicted on one rank
            (the loss looks at whole completions); None: any may be.
    """

    def own(rows: Rows) -> Rows:
        assert rows.layout is not None, "padded rows are not cut"
        length = -(-rows.tokens_BL.size // num_parts)
        behind = length * num_parts - rows.tokens_BL.size
        here = slice(part * length, (part + 1) * length)
        tokens, positions = (np.pad(x[0], (0, behind))[None, here] for x in (rows.tokens_BL, rows.positions_BL))
        mine = _parts(rows.index_T, num_parts, completion_T) == part
        return dataclasses.replace(
            rows, tokens_BL=tokens, positions_BL=positions, predictor_T=rows.predictor_T[mine],
            index_T=rows.index_T[mine], num_parts=num_parts,
        )  # fmt: skip

    prompt = None if micro_batch.prompt is None else own(micro_batch.prompt)
    return MicroBatch(rows=tuple(map(own, micro_batch.rows)), prompt=prompt)


def _parts(index_T: Int64, num_parts: int, completion_T: Int64 | None) -> Int64:
    """Which part predicts each of a row's tokens: consecutive ones, about as many each."""
    middle_T = np.arange(index_T.size) + 0.5
    if completion_T is not None and index_T.size:
        of_T = completion_T[index_T]
        _, first, size = np.unique(of_T, return_index=True, return_counts=True)
        middle = dict(zip(of_T[first].tolist(), (first + size / 2).tolist(), strict=True))
        middle_T = np.array([middle[completion] for completion in of_T.tolist()])
    parts_T: Int64 = np.minimum(middle_T * num_parts // max(1, index_T.size), num_parts - 1).astype(np.int64)
    return parts_T


class Context:
    """The ranks that share rows, and how their tensors change hands.

    Args:
        group: those ranks, in the order of their parts.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)

    def to_heads(self, x_LHD: Tensor, num_tokens: int) -> Tensor:
        """From own tokens with all heads to all tokens with own heads, [T, H / C, D].

        Heads fewer than ranks (keys and values of grouped queries) are repeated first: each rank gets its queries' one.
        """
        repeats = -(-self.size // x_LHD.shape[1])
        if repeats > 1:
            x_LHD = x_LHD.repeat_interleave(repeats, dim=1)
        x: Tensor = _Exchange.apply(x_LHD, self._heads_of_all, self._tokens_of_all)  # type: ignore[no-untyped-call]
        return x[:num_tokens]

    def to_tokens(self, x_THD: Tensor) -> Tensor:
        """From all tokens with own heads back to own tokens with all heads, [L, H, D]."""
        behind = -len(x_THD) % self.size
        padded = functional.pad(x_THD, (0, 0, 0, 0, 0, behind))
        x: Tensor = _Exchange.apply(padded, self._tokens_of_all, self._heads_of_all)  # type: ignore[no-untyped-call]
        return x

    def gather(self, x_LH: Tensor, num_tokens: int) -> Tensor:
        """From own tokens to all, [T, H]. Each rank sends back gradients of all, and gets the sum of its own."""
        x: Tensor = _Gather.apply(x_LH, self)  # type: ignore[no-untyped-call]
        return x[:num_tokens]

    def _heads_of_all(self, x: Tensor) -> Tensor:
        """[L, H, D] -> [C L, H / C, D]."""
        return self._exchange(x.unflatten(1, (self.size, -1)).transpose(0, 1)).flatten(0, 1)

    def _tokens_of_all(self, x: Tensor) -> Tensor:
        """[C L, H / C, D] -> [L, H, D]."""
        return self._exchange(x.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1, 2)

    def _exchange(self, parts: Tensor) -> Tensor:
        """Send the c-th of [C, ...] to rank c; return what each has sent here, [C, ...]."""
        parts = parts.contiguous()
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group)
        return received


def check_context(model: PreTrainedModel, size: int, *, shares_prefix: bool) -> None:
    """Refuse a model whose rows cannot be divided among so many ranks.

    Raises:
        ConfigError: says what would work.
    """
    if not shares_prefix:
        raise ConfigError(
            f"context_parallel_size {size}: {type(model).__name__} cannot share prompts, and only rows that do are"
            " divided; use 1"
        )
    config = model.config.get_text_config()
    if moving := sorted(_rope_types(config.to_dict()) & POSITION_DEPENDENT):
        raise ConfigError(
            f"context_parallel_size {size}: rotary positions of type {', '.join(moving)} depend on the longest position"
            " of a call, and ranks have different ones; use 1"
        )
    queries = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or queries
    if queries % size or (keys % size and size % keys):
        raise ConfigError(
            f"context_parallel_size {size}: each rank attends with its share of {queries} query and {keys} key heads;"
            f" use one of {', '.join(map(str, _sizes(queries, keys)))}"
        )


def _rope_types(config: dict[str, Any]) -> set[str]:
    """The kinds of rotary positions a model has, of some or all of its layers."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    each = [parameters, *(of_layers for of_layers in parameters.values() if isinstance(of_layers, dict))]
    return {str(one.get("rope_type", one.get("type", ""))) for one in each}


def _sizes(queries: int, keys: int) -> list[int]:
    return [size for size in range(1, queries + 1) if queries % size == 0 and (keys % size == 0 or size % keys == 0)]


class _Exchange(torch.autograd.Function):
    """An all-to-all one way, and its gradients the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad_outputs[0]), None, None


class _Gather(torch.autograd.Function):
    """[L, H] -> [C L, H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, context: Context) -> Tensor:
        ctx.context = context
        gathered = x.new_empty(context.size * len(x), *x.shape[1:])
        _all_gather(gathered, x.contiguous(), group=context.group)
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad,) = grad_outputs
        summed = grad.to(torch.promote_types(grad.dtype, torch.float32)).contiguous()
        own = summed.new_empty(len(grad) // ctx.context.size, *grad.shape[1:])
        _reduce_scatter(own, summed, group=ctx.context.group)
        return own.to(grad.dtype), None
