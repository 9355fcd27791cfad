"""Output head and loss in one pass, for losses that are sums over tokens.

A loss that is a sum of terms, each of one token's logprob, has its gradient d loss / d logprob known as soon as the
token's logits are: so the chunk of logits that gave the logprobs becomes the gradient before the next chunk is
computed, and the head runs once, not twice. Three matrix products as in plain autograd, in the memory of one chunk.
(The idea is that of Liger's fused linear cross-entropy, arXiv 2410.10989; here for any loss of that form.)

Losses that look at whole sequences, or at the entropy, need logprobs.py, which this file shares its arithmetic with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from learner.model.logprobs import HeadGradients, Statistics, chunks, in_head_dtype, send_back, without_autocast

TokenLossFunction = Callable[[Tensor, slice], Tensor]
"""Given the logprobs [rows] of some consecutive tokens and which of the T they are: their share [] of the loss."""


def fused_token_loss(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_T: Tensor,
    temperature_T: Tensor,
    token_loss: TokenLossFunction,
    *,
    fp32: bool = False,
    accumulates: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a loss of the target tokens' logprobs, and its gradients at once.

    Args:
        hidden_TH: [T, H] last hidden state of the position before each target.
        weight_VH: [V, H] of the output head.
        bias_V: [V] of the output head, or None.
        targets_T: [T] int64.
        temperature_T: [T] > 0.
        token_loss: the loss; called once for every chunk of tokens, in order.
        fp32: matrix products in float32, whatever the model's dtype or autocast.
        accumulates: the loss will be backpropagated, as it is, into gradients that add up: where the weight has one
            already, this one is added to it here and now, which saves a tensor of the weight's size.

    Returns:
        The loss [], to be differentiated once with respect to hidden states, weight and bias; logprobs [T] and
        entropies [T] in nats, not differentiable. All float32 (float64 for a float64 model).
    """
    hidden_TH = in_head_dtype(hidden_TH, fp32=fp32)
    arguments = (hidden_TH, weight_VH, bias_V, targets_T, 1.0 / temperature_T, token_loss, accumulates)
    loss, logprobs_T, entropy_T = _FusedTokenLoss.apply(*arguments)  # type: ignore[no-untyped-call]
    return loss, logprobs_T, entropy_T


class _FusedTokenLoss(torch.autograd.Function):
    """Everything happens in the forward pass; the backward pass hands out what it left."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        inverse_temperature: Tensor,
        token_loss: TokenLossFunction,
        accumulates: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with without_autocast(hidden):
            head = weight.to(hidden.dtype)
            statistics = Statistics(hidden, targets, inverse_temperature)
            frozen, onto = not ctx.needs_input_grad[1], weight.grad if accumulates else None
            gradients = HeadGradients(hidden, weight, head, bias, frozen=frozen, onto=onto)
            loss = statistics.logprobs.new_zeros(())
            for rows, logits in chunks(hidden, head, bias):
                statistics.add(rows, logits)
                part, slope = _value_and_slope(token_loss, statistics.logprobs[rows, 0], rows)
                loss += part
                send_back(statistics, gradients, rows, logits, slope, None)
        ctx.gradients, ctx.accumulates = gradients.result(), accumulates
        logprobs, entropy = statistics.logprobs.squeeze(1), statistics.entropy.squeeze(1)
        ctx.mark_non_differentiable(logprobs, entropy)
        ctx.set_materialize_grads(False)
        return loss, logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight, d_bias = ctx.gradients
        del ctx.gradients  # autograd copies a gradient that somebody else still holds
        scale = grad_outputs[0].item()
        assert scale == 1.0 or not ctx.accumulates, "a part of the gradient is where it belongs already"
        if scale != 1.0:  # spares a pass over a gradient of the weight's size
            for gradient in (d_hidden, d_weight, d_bias):
                if gradient is not None:
                    gradient.mul_(scale)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _value_and_slope(token_loss: TokenLossFunction, logprobs: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Evaluate the loss of some tokens, and its derivative with respect to their logprobs."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        part = token_loss(leaf, rows)
        (slope,) = torch.autograd.grad(part, leaf)
    return part.detach(), slope
