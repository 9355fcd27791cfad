"""Logprobs of given tokens and the entropy beside them, without ever holding logits for all tokens.

The output head is the largest layer of a small model and its logits the largest tensor of a step: [T, V] in float32
is 2 GiB for 4096 tokens of a vocabulary of 131,072. Here the head runs over chunks of tokens, and runs again in the
backward pass instead of keeping anything of size V: one matrix product more (4 for 3) against memory for one chunk.

    z = h W' / T,   logprob = z[token] - logsumexp(z),   entropy = logsumexp(z) - sum_v softmax(z)_v z_v
    d logprob / d z = onehot(token) - softmax(z),   d entropy / d z_v = - softmax(z)_v (log softmax(z)_v + entropy)

Where the loss is a sum over tokens the second run of the head can be saved, too: see fused_head.py.
Matrix products are in the model's (or autocast's) dtype, or in float32 on request; everything after them in float32
at least. A logit of -inf has probability 0, adds nothing to the entropy and gets no gradient.
Shapes: T tokens that are predicted, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20
MIN_CHUNK_TOKENS = 256
"""Logits held at a time, and at least so many rows of them: fewer rows make slow matrix products, many more are no
faster (measured on CPU)."""
TILE_ELEMENTS = 1 << 17
"""Logits that are worked on at a time: half a MiB stays in a core's cache (2 to 3 times faster than whole chunks)."""
MOVED_ROWS = 8
"""Of a chunk's logits, copied at a time."""
LINE_BYTES = 64
"""Of a cache."""
LOWEST = -1e4
"""Logits this far below the largest have probability 0 in every dtype; kept finite, because 0 x -inf is not 0."""


def token_logprobs(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature_T: Tensor,
    *,
    fp32: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log softmax(logits / temperature) of the target tokens.

    Args:
        hidden_TH: [T, H] last hidden state of the position before each target.
        weight_VH: [V, H] of the output head.
        bias_V: [V] of the output head, or None.
        targets_T: [T] int64.
        temperature_T: [T] > 0.
        fp32: matrix products in float32, whatever the model's dtype or autocast.

    Returns:
        logprobs [T] and entropies [T] in nats, both differentiable and float32 (float64 for a float64 model).
    """
    arguments = (in_head_dtype(hidden_TH, fp32=fp32), weight_VH, bias_V, targets_T, 1.0 / temperature_T)
    logprobs_T, entropy_T = _TokenLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    return logprobs_T, entropy_T


class _TokenLogprobs(torch.autograd.Function):
    """Chunks for the matrix products, tiles for the arithmetic on logits."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, inverse_temperature: Tensor
    ) -> tuple[Tensor, Tensor]:
        with without_autocast(hidden):
            head = weight.to(hidden.dtype)
            statistics = Statistics(hidden, targets, inverse_temperature)
            for rows, logits in chunks(hidden, head, bias):
                statistics.add(rows, logits)
        ctx.save_for_backward(hidden, weight, head, bias)
        ctx.statistics = statistics
        ctx.set_materialize_grads(False)  # no loss looks at the entropy, as a rule: None is cheaper than zeros
        return statistics.logprobs.squeeze(1), statistics.entropy.squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, head, bias = ctx.saved_tensors
        gradients = HeadGradients(hidden, weight, head, bias, frozen=not ctx.needs_input_grad[1])
        for rows, logits in chunks(hidden, head, bias):
            logprobs, entropy = (None if grad is None else grad[rows] for grad in grad_outputs)
            send_back(ctx.statistics, gradients, rows, logits, logprobs, entropy)
        return *gradients.result(), None, None


def send_back(
    statistics: Statistics,
    gradients: HeadGradients,
    rows: slice,
    logits: Tensor,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
) -> None:
    """Add the gradients that come through the logits [rows, V] of some tokens, which are overwritten.

    Tokens without a gradient (clipped, or of advantage 0) are left out of the two matrix products.

    Args:
        statistics: with these tokens.
        gradients: what to add to.
        rows: which tokens.
        logits: theirs.
        d_logprobs: [rows] gradients with respect to their logprobs, or None.
        d_entropy: [rows] gradients with respect to their entropies, or None.
    """
    moving = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for gradient in (d_logprobs, d_entropy):
        if gradient is not None:
            moving |= gradient != 0
    kept = _to_front_(logits, moving)
    logits = logits[: len(kept)]
    d_logprobs, d_entropy = (None if grad is None else grad[kept, None] for grad in (d_logprobs, d_entropy))
    tokens = kept + rows.start
    statistics.differentiate_(tokens, logits, d_logprobs, d_entropy)
    gradients.add(tokens, logits)


class Statistics:
    """What is known of every token once its logits have been seen: all [T, 1].

    Args:
        hidden: [T, H], for dtype and device.
        targets: [T].
        inverse_temperature: [T].
    """

    def __init__(self, hidden: Tensor, targets: Tensor, inverse_temperature: Tensor) -> None:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        self._inverse_temperature = inverse_temperature.to(accumulate)[:, None]
        self._targets = targets[:, None]
        self.logprobs, self.entropy, self._lse = (hidden.new_empty(len(hidden), 1, dtype=accumulate) for _ in range(3))

    def add(self, rows: slice, logits: Tensor) -> None:
        """Take in the logits [rows, V] of some tokens, which stay as they are."""
        for tile in _tiles(rows, logits.shape[1]):
            z = logits[tile.start - rows.start : tile.stop - rows.start] * self._inverse_temperature[tile]
            largest = z.amax(-1, keepdim=True)
            z.sub_(largest)
            chosen = z.gather(1, self._targets[tile])
            weights = z.clamp_min_(LOWEST).exp()
            total = weights.sum(-1, keepdim=True)
            log_total = total.log()
            self.logprobs[tile] = chosen - log_total
            self.entropy[tile] = log_total - weights.mul_(z).sum(-1, keepdim=True) / total
            self._lse[tile] = largest + log_total

    def differentiate_(
        self, tokens: Tensor, logits: Tensor, d_logprobs: Tensor | None, d_entropy: Tensor | None
    ) -> None:
        """Replace the logits [n, V] of n tokens by the gradients with respect to them.

        Args:
            tokens: [n] int64, which of the T.
            logits: as given to `add`.
            d_logprobs: [n, 1] gradients with respect to their logprobs, or None.
            d_entropy: [n, 1] gradients with respect to their entropies, or None.
        """
        lse, entropy, targets = self._lse[tokens], self.entropy[tokens], self._targets[tokens]
        inverse_temperature = self._inverse_temperature[tokens]
        slope = torch.zeros_like(lse) if d_logprobs is None else d_logprobs.to(lse.dtype)
        for tile in _tiles(slice(0, len(logits)), logits.shape[1]):
            part, scale = logits[tile], inverse_temperature[tile]
            z = part.to(scale.dtype).mul_(scale).sub_(lse[tile])  # in place, where the dtypes are equal
            if d_entropy is None:
                d_logits = z.exp_().mul_(slope[tile] * -scale)
            else:
                surprise = z.clamp_min(LOWEST).add_(entropy[tile]).mul_(d_entropy[tile]).add_(slope[tile])
                d_logits = z.exp_().mul_(surprise).mul_(-scale)
            d_logits.scatter_add_(1, targets[tile], slope[tile] * scale)
            if d_logits.dtype != part.dtype:
                part.copy_(d_logits)


class HeadGradients:
    """Gradients of the head's inputs, gathered chunk by chunk.

    Args:
        hidden: [T, H].
        weight: [V, H].
        head: the weight in the dtype of hidden.
        bias: [V] or None.
        frozen: the weight does not train (an adapter does): a matrix product less.
        onto: the weight's gradient so far, to be added to in place; `result` then has none for the weight.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        head: Tensor,
        bias: Tensor | None,
        *,
        frozen: bool,
        onto: Tensor | None = None,
    ) -> None:
        self._hidden, self._head, self._frozen = hidden, head, frozen
        self._dtype = weight.dtype
        self._d_hidden = torch.zeros_like(hidden)
        self._d_weight, self._in_place = onto, onto is not None
        self._d_bias = None if bias is None else torch.zeros_like(bias)

    def add(self, tokens: Tensor, d_logits: Tensor) -> None:
        """Take in the gradients [n, V] with respect to the logits of the tokens [n]."""
        self._d_hidden[tokens] = d_logits @ self._head
        hidden = self._hidden[tokens]
        if self._frozen:
            pass
        elif self._d_weight is None:
            self._d_weight = d_logits.T @ hidden
            # Sums of many chunks are kept in the wider of both dtypes.
            self._d_weight = self._d_weight.to(torch.promote_types(self._dtype, d_logits.dtype))
        elif self._d_weight.dtype == d_logits.dtype:
            self._d_weight.addmm_(d_logits.T, hidden)
        else:
            self._d_weight += d_logits.T @ hidden
        if self._d_bias is not None:
            self._d_bias += d_logits.sum(0)

    def result(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Hand over the gradients of hidden, weight (None where frozen, without tokens, or done) and bias."""
        d_weight = None if self._d_weight is None or self._in_place else self._d_weight.to(self._dtype)
        self._d_weight = None  # autograd copies a gradient that somebody else still holds
        return self._d_hidden, d_weight, self._d_bias


def in_head_dtype(hidden_TH: Tensor, *, fp32: bool) -> Tensor:
    """Cast hidden states to the dtype that the head's matrix products are to run in."""
    device = hidden_TH.device.type
    if fp32:
        return hidden_TH.to(torch.promote_types(hidden_TH.dtype, torch.float32))
    return hidden_TH.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else hidden_TH


def without_autocast(hidden: Tensor) -> torch.autocast:
    """Keep autocast, which the caller may be in, from rounding what was chosen to be float32."""
    return torch.autocast(hidden.device.type, enabled=False)


def chunks(hidden: Tensor, head: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the logits [rows, V] of some rows at a time, all in one buffer that may be overwritten."""
    height = max(MIN_CHUNK_TOKENS, CHUNK_BYTES // (len(head) * head.element_size()))
    buffer = _spread_rows(hidden, min(height, len(hidden)), len(head))
    for start in range(0, len(hidden), height):
        rows = slice(start, min(start + height, len(hidden)))
        logits = torch.mm(hidden[rows], head.T, out=buffer[: rows.stop - start])
        yield rows, logits if bias is None else logits.add_(bias)


def _spread_rows(like: Tensor, height: int, width: int) -> Tensor:
    """Make an empty matrix whose rows begin an odd number of cache lines apart.

    Vocabularies are round numbers, and rows a power of two apart share a few sets of the cache: matrix products with
    such a matrix were seen to be a fifth slower, in and out (CPU, 32,768 columns).
    """
    per_line = LINE_BYTES // like.element_size()
    lines = -(-width // per_line) | 1
    return like.new_empty(height, lines * per_line)[:, :width]


def _tiles(rows: slice, vocabulary: int) -> Iterator[slice]:
    """Cut the rows of a chunk into tiles of about TILE_ELEMENTS logits."""
    height = max(1, TILE_ELEMENTS // vocabulary)
    for start in range(rows.start, rows.stop, height):
        yield slice(start, min(start + height, rows.stop))


def _to_front_(logits: Tensor, wanted: Tensor) -> Tensor:
    """Move the wanted rows to the front, over others. Returns which row each was, [number wanted]."""
    kept = torch.arange(int(wanted.sum()), device=logits.device)
    holes = (~wanted[: len(kept)]).nonzero()[:, 0]
    behind = wanted[len(kept) :].nonzero()[:, 0] + len(kept)
    kept[holes] = behind
    for to, origin in zip(holes.split(MOVED_ROWS), behind.split(MOVED_ROWS), strict=True):
        logits[to] = logits[origin]
    return kept
