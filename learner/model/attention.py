"""Attention of packed rows whose completions share the keys and values of their prompt.

A row holds prompts, then the completions of each (packing.Layout). Prompts attend causally to themselves; a completion
token attends to all of its prompt and causally to its own completion. That is computed without masks and without
copies of the prompt's keys, as a cascade (the prefix sharing of Hydragen, arXiv 2402.05099, with a backward pass):

    1. all completion tokens of a group against the prompt:  out1, lse1   (one dense call)
    2. each completion against itself, causally:             out2, lse2   (one call per bucket of equal lengths)
    3. softmax over both:  w = sigmoid(lse1 - lse2),  out = w out1 + (1 - w) out2,  lse = logaddexp(lse1, lse2)

In the backward pass each part is given the *merged* out and lse: flash attention recomputes its probabilities as
exp(score - lse) and its correction as grad_out . out, so with the merged values both parts' gradients are those of the
whole softmax, and simply add up.

The cascade needs log-sum-exps, which torch gives only from private CPU operators; where they are not (CUDA, other
torch versions, unequal head sizes) the same attention is computed with public operators: one masked call per bucket,
or on request a single call of FlexAttention (flex.py).

Shapes: T tokens of the row, S of them in prompts, H query heads, K key heads, D head size, N sequences, R longest.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface

from learner.model.context import Context
from learner.model.flex import flex_with_prefix
from learner.model.packing import Bucket, Layout

ATTENTION = "headway_shared_prefix"
FLEX_ATTENTION = "headway_shared_prefix_flex"
"""The names under which transformers knows it. They have no mask function: transformers then builds no mask."""

Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Layout, float | None], Tensor]

HAS_CPU_FLASH = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu") and hasattr(
    torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward"
)


class Prefix:
    """Keys and values of a prompt that was forwarded apart, by layer.

    No dataclass, as Packed is none: FSDP replaces those that it finds among a layer's arguments by copies.
    """

    def __init__(self) -> None:
        self.computed: dict[int, tuple[Tensor, Tensor]] = {}
        """[S, K, D] each, with the prompt's graph behind them."""
        self.leaves: dict[int, tuple[Tensor, Tensor]] = {}
        """The same values cut off from that graph: they collect the gradients of all completions."""

    def keep(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Remember a layer's keys and values. A checkpointed layer that runs again has them here already."""
        if layer in self.computed:
            return
        self.computed[layer] = (keys, values)
        self.leaves[layer] = (
            keys.detach().requires_grad_(keys.requires_grad),
            values.detach().requires_grad_(values.requires_grad),
        )

    def gradients(self) -> tuple[list[Tensor], list[Tensor]]:
        """Pair what was computed with the gradients its leaves have collected."""
        pairs = [
            (computed, leaf.grad)
            for layer, tensors in self.computed.items()
            for computed, leaf in zip(tensors, self.leaves[layer], strict=True)
            if leaf.grad is not None
        ]
        return [computed for computed, _ in pairs], [gradient for _, gradient in pairs]


class Packed:
    """What the model hands through to every attention layer of one call."""

    def __init__(self, layout: Layout, prefix: Prefix | None = None, context: Context | None = None) -> None:
        self.layout = layout
        self.prefix = prefix
        """To be filled where the row is a prompt alone, to be read where the row has no prompt."""
        self.context = context
        """The ranks that the row's tokens are divided among. Its prefix then is of this rank's heads."""


def shared_prefix_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    packed: Packed,
    scaling: float | None = None,
    dropout: float = 0.0,
    attend: Attend | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as `packed.layout` says. The interface is transformers' AttentionInterface.

    Args:
        module: the attention layer; its `layer_idx` names the keys and values kept apart.
        query: [1, H, T, D], rotary position already applied.
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: None.
        packed: who attends to whom.
        scaling: of the scores; None is 1/sqrt(D).
        dropout: 0.
        attend: how completions attend; None is attend_with_prefix.
        options: refused where they would change the result.

    Returns:
        [1, T, H, D], and no attention weights.

    Raises:
        NotImplementedError: the layer wants something that a shared prefix cannot give.
    """
    wanted = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if attention_mask is not None or dropout or wanted:
        raise NotImplementedError(f"attention with {wanted or 'a mask or dropout'}")
    q, k, v = (x.to(_arithmetic(value)).transpose(1, 2)[0] for x in (query, key, value))
    layout, prefix, context = packed.layout, packed.prefix, packed.context
    if context is not None:
        q, k, v = (context.to_heads(x, layout.num_tokens) for x in (q, k, v))
    num_prompt = sum(bucket.num_tokens for bucket in layout.prompts)
    num_completion = q.shape[0] - num_prompt
    # split, not slices: the backward of a slice fills a whole tensor with zeros.
    (q_prompt, q), (k_prompt, k), (v_prompt, v) = (x.split([num_prompt, num_completion]) for x in (q, k, v))
    outputs = []
    with torch.autocast(value.device.type, enabled=False):  # it would take public operators back to bfloat16
        if num_prompt:
            outputs.append(_causal(q_prompt, k_prompt, v_prompt, layout.prompts, scaling))
            if prefix is not None:
                prefix.keep(module.layer_idx, k_prompt, v_prompt)  # type: ignore[arg-type]
        elif prefix is not None:
            k_prompt, v_prompt = prefix.leaves[module.layer_idx]  # type: ignore[index]
        if num_completion:
            outputs.append((attend or attend_with_prefix)(q, k, v, k_prompt, v_prompt, layout, scaling))
    out = torch.cat(outputs)
    return (out if context is None else context.to_tokens(out))[None].to(value.dtype), None


def _arithmetic(value: Tensor) -> torch.dtype:
    """Choose the dtype to attend in; queries and keys may come in float32 (rotary positions) where values do not.

    On CPU the bfloat16 flash backward is 2 to 8 times slower than float32 for sequences of up to 64 tokens, and not
    faster for 512 (measured with torch 2.13 on a CPU with AMX).
    """
    return torch.promote_types(value.dtype, torch.float32) if value.device.type == "cpu" else value.dtype


def attend_with_prefix(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, layout: Layout, scaling: float | None
) -> Tensor:
    """Attend from completion tokens to their prompt and to themselves.

    Args:
        q: [T - S, H, D].
        k: [T - S, K, D].
        v: [T - S, K, D].
        k_prompt: [S, K, D].
        v_prompt: [S, K, D].
        layout: of the row.
        scaling: of the scores.

    Returns:
        [T - S, H, D].
    """
    if HAS_CPU_FLASH and q.device.type == "cpu" and q.shape[-1] == v.shape[-1]:
        out: Tensor = _Cascade.apply(q, k, v, k_prompt, v_prompt, layout, scaling)  # type: ignore[no-untyped-call]
        return out
    return _masked(q, k, v, k_prompt, v_prompt, layout, scaling)


class _Cascade(torch.autograd.Function):
    """The cascade of the module's docstring, over the private CPU flash operators."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        k_prompt: Tensor,
        v_prompt: Tensor,
        layout: Layout,
        scaling: float | None,
    ) -> Tensor:
        out1, out2 = torch.empty_like(q), torch.empty_like(q)
        accumulate = torch.promote_types(q.dtype, torch.float32)
        lse1, lse2 = (q.new_empty(*q.shape[:2], 1, dtype=accumulate) for _ in range(2))
        for group, prompt in _groups(layout):
            out1[group], lse1[group] = _flash(q[group], k_prompt[prompt], v_prompt[prompt], None, scaling)
        for span, bucket in _spans(layout):
            out2[span], lse2[span] = _flash(q[span], k[span], v[span], bucket, scaling)
        out = torch.lerp(out2.to(accumulate), out1.to(accumulate), torch.sigmoid(lse1 - lse2)).to(q.dtype)
        ctx.save_for_backward(q, k, v, k_prompt, v_prompt, out, torch.logaddexp(lse1, lse2))
        ctx.layout, ctx.scaling = layout, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, k_prompt, v_prompt, out, lse = ctx.saved_tensors
        (grad,) = grad_outputs
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        dk_prompt, dv_prompt = torch.zeros_like(k_prompt), torch.zeros_like(v_prompt)
        for s, bucket in _spans(ctx.layout):
            merged = (grad[s], q[s], k[s], v[s], out[s], lse[s])
            dq[s], dk[s], dv[s] = _flash_backward(*merged, bucket, ctx.scaling)
        for s, p in _groups(ctx.layout):
            merged = (grad[s], q[s], k_prompt[p], v_prompt[p], out[s], lse[s])
            dq_group, dk_prompt[p], dv_prompt[p] = _flash_backward(*merged, None, ctx.scaling)
            dq[s] += dq_group
        return dq, dk, dv, dk_prompt, dv_prompt, None, None


def _flash(q: Tensor, k: Tensor, v: Tensor, bucket: Bucket | None, scaling: float | None) -> tuple[Tensor, Tensor]:
    """Attend causally within each sequence of the bucket, or (None) from every query to every key.

    Returns:
        out [T, H, D], lse [T, H, 1]
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_pad(x, bucket) for x in (q, k, v)), is_causal=bucket is not None, scale=scaling
    )
    return _unpad(out, bucket), _unpad(lse[..., None], bucket)


def _flash_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bucket: Bucket | None,
    scaling: float | None,
) -> list[Tensor]:
    """Compute dq, dk, dv of `_flash`, given an out and lse that other keys may have had their share in.

    The zero gradients of padded queries add nothing to the keys they see.
    """
    grad, q, k, v, out, lse = (_pad(x, bucket) for x in (grad, q, k, v, out, lse))
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse[..., 0], 0.0, bucket is not None, scale=scaling
    )
    return [_unpad(x, bucket) for x in gradients]


def _causal(q: Tensor, k: Tensor, v: Tensor, buckets: tuple[Bucket, ...], scaling: float | None) -> Tensor:
    """Attend causally within each sequence, with public operators. [S, H, D], [S, K, D], [S, K, D] -> [S, H, D]."""
    sizes = [bucket.num_tokens for bucket in buckets]
    outputs = []
    for bucket, *tensors in zip(buckets, q.split(sizes), k.split(sizes), v.split(sizes), strict=True):
        queries, keys, values = (_pad(x, bucket) for x in tensors)
        out = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        outputs.append(_unpad(out, bucket))
    return torch.cat(outputs)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, k_prompt: Tensor, v_prompt: Tensor, layout: Layout, scaling: float | None
) -> Tensor:
    """Compute what the cascade does with public operators: each sequence's keys behind a view of its prompt's."""
    sizes = [bucket.num_tokens for _, bucket in _spans(layout)]
    own = zip(q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    prompts = zip(k_prompt.split(layout.prompt_lengths), v_prompt.split(layout.prompt_lengths), strict=True)
    outputs = []
    for buckets, (keys, values) in zip(layout.completions, prompts, strict=True):
        for bucket in buckets:
            queries, *own_kv = (_pad(x, bucket) for x in next(own))
            shared = (x.transpose(0, 1).expand(len(bucket.lengths), -1, -1, -1) for x in (keys, values))
            k_all, v_all = (torch.cat(pair, 2) for pair in zip(shared, own_kv, strict=True))
            visible = torch.ones(queries.shape[2], k_all.shape[2], dtype=torch.bool, device=q.device)
            out = functional.scaled_dot_product_attention(
                queries,
                k_all,
                v_all,
                attn_mask=visible.tril(diagonal=len(keys)),
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
            outputs.append(_unpad(out, bucket))
    return torch.cat(outputs)


def _groups(layout: Layout) -> Iterator[tuple[slice, slice]]:
    """Yield where each group's completion tokens and its prompt's tokens are."""
    token = prompt = 0
    for length, prompt_length in zip(layout.group_lengths, layout.prompt_lengths, strict=True):
        if length:
            yield slice(token, token + length), slice(prompt, prompt + prompt_length)
        token, prompt = token + length, prompt + prompt_length


def _spans(layout: Layout) -> Iterator[tuple[slice, Bucket]]:
    """Yield where each bucket's completion tokens are."""
    token = 0
    for bucket in itertools.chain.from_iterable(layout.completions):
        yield slice(token, token + bucket.num_tokens), bucket
        token += bucket.num_tokens


def _pad(x: Tensor, bucket: Bucket | None) -> Tensor:
    """[T, H, D] -> [N, H, R, D], zeros behind shorter sequences; None takes all tokens for one sequence."""
    if bucket is None:
        return x.transpose(0, 1)[None]
    num_sequences = len(bucket.lengths)
    if bucket.slots is not None:
        flat = x.new_zeros(num_sequences * bucket.padded_length, *x.shape[1:])
        x = flat.index_copy(0, torch.from_numpy(bucket.slots).to(x.device), x)
    batch: Tensor = x.view(num_sequences, bucket.padded_length, *x.shape[1:])
    return batch.transpose(1, 2)


def _unpad(x: Tensor, bucket: Bucket | None) -> Tensor:
    """[N, H, R, D] -> [T, H, D]: the inverse of `_pad`."""
    flat = x.transpose(1, 2).flatten(0, 1)
    if bucket is None or bucket.slots is None:
        return flat
    return flat.index_select(0, torch.from_numpy(bucket.slots).to(x.device))


AttentionInterface.register(ATTENTION, shared_prefix_attention)
AttentionInterface.register(FLEX_ATTENTION, functools.partial(shared_prefix_attention, attend=flex_with_prefix))
