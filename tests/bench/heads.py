"""The output head with its loss, forward and backward: time and peak memory, at two sizes of vocabulary.

All sides get the same float32 hidden states [T, 512], head and loss (a clipped surrogate) and give the same gradients;
each measures one pass, after a small one to warm up. Peak is the growth of the resident set over what the inputs take.
Controls: plain autograd over whole logits, and the fused head of TRL where it is installed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from tests.bench.harness import Row, Skip
from tests.bench.memory import peak_mib, reset_peak

if TYPE_CHECKING:
    from torch import Tensor

HIDDEN = 512
VOCABULARIES = {"32k": 32_768, "152k": 151_936}
PASSES = {"time": "CPU s", "peak": "MiB over base"}


def run(head: str, vocabulary: str, measure: str, quick: bool) -> float:
    """One pass of a head: CPU seconds, or MiB over what was there before."""
    seconds, grown_mib = one_pass(head, VOCABULARIES[vocabulary], 1024 if quick else 4096)
    return seconds if measure == "time" else grown_mib


def one_pass(head: str, size: int, tokens: int) -> tuple[float, float]:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = torch.empty(size, HIDDEN).normal_(std=0.05).requires_grad_()
    hidden, targets = torch.randn(tokens, HIDDEN), torch.randint(0, size, (tokens,))
    forward_backward: Callable[..., Tensor] = HEADS[head]
    forward_backward(
        torch.randn(8, HIDDEN).requires_grad_(), weight[:1000].detach().requires_grad_(), targets[:8] % 1000
    )
    weight.grad = None
    hidden.requires_grad_()
    before_mib, started_s = reset_peak(), time.process_time()
    logprobs = forward_backward(hidden, weight, targets)
    seconds, grown_mib = time.process_time() - started_s, peak_mib() - before_mib
    assert weight.grad is not None
    assert hidden.grad is not None
    _check(hidden, weight, targets, logprobs)
    return seconds, grown_mib


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, logprobs: Tensor) -> None:
    """Whoever is fast must be right: the gradients of a few tokens' hidden states, by the book."""
    import torch

    few = slice(0, 4)
    leaf = hidden.detach()[few].requires_grad_()
    expected = torch.log_softmax(leaf @ weight.detach().T, -1).gather(1, targets[few, None])[:, 0]
    loss(expected, few).backward()
    torch.testing.assert_close(logprobs[few], expected.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden.grad[few], leaf.grad, rtol=1e-3, atol=1e-5)


def loss(logprobs_T: Tensor, rows: slice) -> Tensor:
    """A clipped surrogate, on half of the tokens of either sign."""
    import torch

    ratio = torch.exp(logprobs_T - logprobs_T.detach())
    advantages = torch.ones_like(ratio)
    advantages[::2] = -1.0
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).sum()


def fused(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    import torch

    from learner.model.fused_head import fused_token_loss

    total, logprobs_T, _ = fused_token_loss(hidden, weight, None, targets, torch.ones(len(hidden)), loss)
    total.backward()
    return logprobs_T


def recompute(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    import torch

    from learner.model.logprobs import token_logprobs

    logprobs_T, _ = token_logprobs(hidden, weight, None, targets, torch.ones(len(hidden)))
    loss(logprobs_T, slice(None)).backward()
    return logprobs_T.detach()


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    import torch

    logprobs_TV = torch.log_softmax(hidden @ weight.T, -1)
    logprobs_T = logprobs_TV.gather(1, targets[:, None])[:, 0]
    with torch.no_grad():  # the entropy is a diagnostic of every side
        for part in logprobs_TV.split(64):
            torch.linalg.vecdot(part.exp(), part)
    loss(logprobs_T, slice(None)).backward()
    return logprobs_T.detach()


def trl(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    try:
        from trl.trainer import utils
    except ImportError:
        raise Skip("trl is not installed (pip install trl==1.16.0)") from None
    arguments: tuple[Any, ...] = (1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",))
    logprobs_T = utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, *arguments)[0]
    loss(logprobs_T, slice(None)).backward()
    return logprobs_T.detach()


HEADS: dict[str, Callable[..., Any]] = {"fused": fused, "recompute": recompute, "naive": naive, "trl": trl}


def _row(ours: str, control: str, vocabulary: str, measure: Literal["time", "peak"], target: float) -> Row:
    sides = {side: partial(run, head, vocabulary, measure) for side, head in (("ours", ours), ("baseline", control))}
    for side in sides.values():
        side.__module__ = __name__  # type: ignore[attr-defined]  # where the harness looks for the row
    return Row(
        name=f"head_{vocabulary}_{ours}_{measure}_{control}",
        control={"naive": "plain autograd, whole logits", "trl": "TRL's fused head"}[control],
        ours=sides["ours"],
        baseline=sides["baseline"],
        ratio="ours/baseline",
        target=target,
        sense="lower",
        unit=PASSES[measure],
        rounds=1 if measure == "peak" else 3,
    )


ROWS = [
    _row("fused", "naive", "152k", "time", 0.9),
    _row("recompute", "naive", "152k", "time", 1.1),
    _row("fused", "trl", "152k", "time", 0.5),
    _row("fused", "naive", "152k", "peak", 1 / 12),
    _row("recompute", "naive", "152k", "peak", 1 / 12),
    _row("fused", "trl", "152k", "peak", 1 / 4),
    _row("fused", "naive", "32k", "time", 0.9),
    _row("recompute", "naive", "32k", "time", 1.1),
    _row("fused", "naive", "32k", "peak", 1 / 4),
]
