"""Logprobs of given tokens and the entropy beside them, without ever holding logits for all tokens.

The output head is the largest layer of a small model and its logits the largest tensor of a step: [T, V] in float32
is 2 GiB for 4096 tokens of a vocabulary of 131,072. Here the head runs over chunks of tokens, and runs again in the
backward pass instead of keeping anything of size V: one matrix product more (4 for 3) against memory for one chunk.

    z = h W' / T,   logprob = z[token] - logsumexp(z),   entropy = logsumexp(z) - sum_v softmax(z)_v z_v
    d logprob / d z = onehot(token) - softmax(z)

Matrix products are in the model's (or autocast's) dtype; everything after them in float32 at least.
Shapes: T tokens that are predicted, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
MIN_CHUNK_TOKENS = 128
"""Logits held at a time, and at least so many rows of them: fewer rows make slow matrix products, many more are no
faster (measured on CPU)."""
TILE_ELEMENTS = 1 << 17
"""Logits that are worked on at a time: half a MiB stays in a core's cache (2 to 3 times faster than whole chunks)."""


def token_logprobs(
    hidden_TH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, targets_T: Tensor, temperature_T: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute log softmax(logits / temperature) of the target tokens.

    Args:
        hidden_TH: [T, H] last hidden state of the position before each target.
        weight_VH: [V, H] of the output head.
        bias_V: [V] of the output head, or None.
        targets_T: [T] int64.
        temperature_T: [T] > 0.

    Returns:
        logprobs [T], differentiable, and entropies [T] in nats, not differentiable; both float32 (float64 for a
        float64 model).
    """
    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        hidden_TH = hidden_TH.to(torch.get_autocast_dtype(device))
    arguments = (hidden_TH, weight_VH, bias_V, targets_T, 1.0 / temperature_T)
    logprobs_T, entropy_T = _TokenLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T


class _TokenLogprobs(torch.autograd.Function):
    """Chunks for the matrix products, tiles for the arithmetic on logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inverse_temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        inverse_temperature = inverse_temperature.to(accumulate)[:, None]
        targets = targets[:, None]
        head = weight.to(hidden.dtype)
        logprobs, entropy, lse = (hidden.new_empty(len(hidden), 1, dtype=accumulate) for _ in range(3))
        for rows, logits in _chunks(hidden, head, bias):
            for tile in _tiles(rows, logits.shape[1]):
                z = logits[_within(tile, rows)].to(accumulate).mul_(inverse_temperature[tile])
                largest = z.amax(-1, keepdim=True)
                z.sub_(largest)
                weights = z.exp()
                total = weights.sum(-1, keepdim=True)
                log_total = total.log()
                logprobs[tile] = z.gather(1, targets[tile]) - log_total
                entropy[tile] = log_total - weights.mul_(z).sum(-1, keepdim=True) / total
                lse[tile] = largest + log_total
        ctx.save_for_backward(hidden, head, bias, targets, inverse_temperature, lse)
        ctx.weight_dtype = weight.dtype
        entropy = entropy.squeeze(1)
        ctx.mark_non_differentiable(entropy)
        return logprobs.squeeze(1), entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, bias, targets, inverse_temperature, lse = ctx.saved_tensors
        slope = grad_outputs[0][:, None] * inverse_temperature
        d_hidden = torch.empty_like(hidden)
        d_weight: Tensor | None = None
        d_bias = None if bias is None else torch.zeros_like(bias)
        for rows, logits in _chunks(hidden, head, bias):
            for tile in _tiles(rows, logits.shape[1]):
                part = logits[_within(tile, rows)]
                z = part.to(lse.dtype).mul_(inverse_temperature[tile])  # part itself, where that is its dtype
                probabilities = z.sub_(lse[tile]).exp_()
                d_logits = probabilities.mul_(-slope[tile]).scatter_add_(1, targets[tile], slope[tile])
                if d_logits.dtype != part.dtype:
                    part.copy_(d_logits)
            torch.mm(logits, head, out=d_hidden[rows])
            if not ctx.needs_input_grad[1]:
                pass  # a frozen head (an adapter trains): a quarter of the matrix products less
            elif d_weight is None:
                d_weight = (logits.T @ hidden[rows]).to(ctx.weight_dtype)
            elif d_weight.dtype == logits.dtype:
                d_weight.addmm_(logits.T, hidden[rows])
            else:
                d_weight += logits.T @ hidden[rows]
            if d_bias is not None:
                d_bias += logits.sum(0)
        return d_hidden, d_weight, d_bias, None, None


def _chunks(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits [rows, V] of some rows at a time, all in one buffer."""
    height = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (len(head) * head.element_size()))
    buffer = hidden.new_empty(min(height, len(hidden)), len(head))
    for start in range(0, len(hidden), height):
        rows = slice(start, min(start + height, len(hidden)))
        logits = torch.mm(hidden[rows], head.T, out=buffer[: rows.stop - start])
        yield rows, logits if bias is None else logits.add_(bias)


def _tiles(rows: slice, vocabulary: int) -> Iterator[slice]:
    """Cut the rows of a chunk into tiles of about TILE_ELEMENTS logits."""
    height = max(1, TILE_ELEMENTS // vocabulary)
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def _within(tile: slice, rows: slice) -> slice:
    """Where a tile is in its chunk."""
    return slice(tile.start - rows.start, tile.stop - rows.start)
