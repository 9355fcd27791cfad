"""Both heads against log_softmax of whole logits in float64: values and gradients, for any shapes, logits and cuts.

The tolerance is that of the project: 1e-5, or three times what plain float32 itself is off, whichever is larger. In
bfloat16 a logprob may be off by what rounding two logits twice to 8 bits makes of it, 2^-7 of the largest; gradients by
BF16_TOLERANCE, or three times what plain bfloat16 is off. Errors of gradients are norm of the difference over norm.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from learner.model import logprobs
from learner.model.fused_head import fused_token_loss
from learner.model.logprobs import token_logprobs

TOLERANCE = 1e-5
BF16_TOLERANCE = 0.02

Case = dict[str, Tensor]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """From uniform distributions to ones where a single token has all the probability; temperatures that differ."""
    tokens, hidden_size, vocabulary = draw(st.integers(1, 40)), draw(st.integers(1, 16)), draw(st.integers(2, 90))
    scale = draw(st.sampled_from([0.0, 0.1, 1.0, 3.0]))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float32)

    return {
        "hidden": normal(tokens, hidden_size) * scale,
        "weight": normal(vocabulary, hidden_size),
        "bias": normal(vocabulary),
        "targets": torch.randint(0, vocabulary, (tokens,), generator=random),
        "temperature": torch.rand(tokens, generator=random) * 1.5 + 0.3,
        "slopes": normal(tokens),
        "anchor": -3.0 * torch.rand(tokens, generator=random),
    }


def token_loss(case: Case) -> Callable[[Tensor, slice], Tensor]:
    """Smooth (a kink would make any rounding look large), every token with a slope of its own in its logprob."""

    def loss(logprobs_T: Tensor, rows: slice) -> Tensor:
        anchor, slopes = (case[name][rows].to(logprobs_T.dtype) for name in ("anchor", "slopes"))
        return (slopes * torch.exp(2.0 * torch.tanh((logprobs_T - anchor) / 4.0))).sum()

    return loss


def arguments_of(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    leaves = (case[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight", "bias"))
    return (*leaves, case["targets"], case["temperature"].to(torch.promote_types(dtype, torch.float32)))


def naive(case: Case, dtype: torch.dtype) -> list[Tensor]:
    hidden, weight, bias, targets, temperature = arguments_of(case, dtype)
    logits = (hidden @ weight.T + bias).to(temperature.dtype)
    logprobs_TV = (logits / temperature[:, None]).log_softmax(-1)
    logprobs_T = logprobs_TV.gather(1, targets[:, None])[:, 0]
    entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(-1)
    loss = token_loss(case)(logprobs_T, slice(None))
    return [logprobs_T, entropy_T, loss, *torch.autograd.grad(loss, (hidden, weight, bias))]


def fused(case: Case, dtype: torch.dtype) -> list[Tensor]:
    arguments = arguments_of(case, dtype)
    loss, logprobs_T, entropy_T = fused_token_loss(*arguments, token_loss(case))
    return [logprobs_T, entropy_T, loss, *torch.autograd.grad(loss, arguments[:3])]


def recompute(case: Case, dtype: torch.dtype) -> list[Tensor]:
    arguments = arguments_of(case, dtype)
    logprobs_T, entropy_T = token_logprobs(*arguments)
    loss = token_loss(case)(logprobs_T, slice(None))
    return [logprobs_T, entropy_T, loss, *torch.autograd.grad(loss, arguments[:3])]


def error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm().clamp_min(1.0)).item()


@pytest.fixture(autouse=True, scope="module", params=["whole", "cut"])
def sizes(request):
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cut":
            patch.setattr(logprobs, "CHUNK_BYTES", 1)
            patch.setattr(logprobs, "MIN_CHUNK_TOKENS", 7)
            patch.setattr(logprobs, "TILE_ELEMENTS", 128)
        yield


@pytest.mark.parametrize("head", [fused, recompute])
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=cases())
def test_float32(head, case):
    exact, plain = naive(case, torch.float64), naive(case, torch.float32)
    for got, rounded, want in zip(head(case, torch.float32), plain, exact, strict=True):
        assert torch.isfinite(got).all()
        assert error(got, want) <= max(TOLERANCE, 3 * error(rounded, want))


@pytest.mark.parametrize("head", [fused, recompute])
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases())
def test_bfloat16(head, case):
    """Against float64 of the same rounded inputs."""
    rounded = {name: x.bfloat16().float() if name in ("hidden", "weight", "bias") else x for name, x in case.items()}
    exact, plain, got = naive(rounded, torch.float64), naive(rounded, torch.bfloat16), head(rounded, torch.bfloat16)
    hidden, weight, bias, _, temperature = arguments_of(rounded, torch.float64)
    largest_T = ((hidden @ weight.T).abs() + bias.abs()).amax(-1) / temperature
    assert got[0].dtype == got[1].dtype == torch.float32
    assert ((got[0] - exact[0]).abs() <= 2**-7 * largest_T + TOLERANCE).all()
    for ours, own, want in zip(got[1:], plain[1:], exact[1:], strict=True):
        assert error(ours, want) <= max(BF16_TOLERANCE, 3 * error(own, want))
